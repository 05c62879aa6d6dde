"""Whatever a load does on GPUs only. The CPU server works without this folder."""
