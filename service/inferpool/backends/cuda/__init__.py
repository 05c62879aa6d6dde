"""The CUDA runtime by ctypes: device memory, streams and page-locked buffers. Experimental."""
