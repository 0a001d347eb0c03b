"""What goes onto a device: the bundle, and the agent that proves and measures an engine there."""
