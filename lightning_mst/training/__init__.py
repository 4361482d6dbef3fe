"""What the callback and the strategies are made of: one concern of a training run in each file."""
