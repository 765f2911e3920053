"""The CUDA engine: kernels of our own behind one seam. docs/engines/gpu.md tells the story, and what has not run."""
