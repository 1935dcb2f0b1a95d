"""Run the PTX that Triton compiles on the CPU, warp by warp, and find races, accesses out of bounds and reads of memory
that nothing wrote. See README.md."""
