"""What differs between the tasks, a file per task. `base.Task` is the interface that the trainer knows."""
