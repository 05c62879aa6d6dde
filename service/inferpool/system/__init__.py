"""The machine: its cores, memory and GPUs, and the commands that install missing packages."""
