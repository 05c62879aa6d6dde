"""What the machine has: cores, memory, GPUs, and the commands that install what is missing."""
