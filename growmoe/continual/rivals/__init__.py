"""Methods of other people, in plain torch: one file each, run by `learner.run_learner`."""
