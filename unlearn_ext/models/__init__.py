"""Opens and writes diffusers folders; samples images; judges them."""
