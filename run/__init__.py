"""What surrounds a training: its folder, checkpoints, guard, records, memory, and the average of its weights."""
