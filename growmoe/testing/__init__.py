"""Checks that a router, a rule or an expert of yours keeps what the library promises of its own.

Each runs a list of contracts, every one a small function that can be run alone, and raises an
AssertionError that says which of them does not hold and where. They need no test framework::

    import growmoe.testing

    def test_my_router():
        growmoe.testing.check_router(MyRouter)

The library's own routers, rules and experts are held to the same lists.
"""

from growmoe.testing.experts import EXPERT_CONTRACTS, check_expert
from growmoe.testing.routers import ROUTER_CONTRACTS, RouterSubject, check_router
from growmoe.testing.rules import RULE_CONTRACTS, check_rule

__all__ = [
    "EXPERT_CONTRACTS",
    "ROUTER_CONTRACTS",
    "RULE_CONTRACTS",
    "RouterSubject",
    "check_expert",
    "check_router",
    "check_rule",
]
