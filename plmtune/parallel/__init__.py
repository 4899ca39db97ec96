"""One model on many processes: layouts, the device mesh, and how modules, layers and sequences are divided."""
