"""What only a GPU needs at load. Experimental: the CPU server works without this folder."""
