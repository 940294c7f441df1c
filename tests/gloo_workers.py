"""Runs a function on several gloo workers of this machine and gives what each returned."""

import datetime
import os
import pickle
import tempfile
import traceback

import torch
import torch.multiprocessing as mp


def on_workers(size, function, *args, timeout=60):
    """[function(rank, size, *args) for each rank], in processes of their own."""
    context = mp.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{os.path.join(folder, 'meet')}"
        workers = [
            context.Process(target=_run, args=(rank, size, where, queue, function, args, timeout))
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        results = {}
        for _ in workers:
            rank, result, error = queue.get(timeout=2 * timeout + 60)
            if error:
                for worker in workers:
                    worker.kill()
                raise AssertionError(f"worker {rank}: {error}")
            results[rank] = pickle.loads(result)
        for worker in workers:
            worker.join(30)
    return [results[rank] for rank in range(size)]


def _run(rank, size, where, queue, function, args, timeout):
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=where,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = function(rank, size, *args)
        torch.distributed.barrier()
        # by value: tensors would otherwise stay in this process's memory
        queue.put((rank, pickle.dumps(result), None))
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
