"""The network: layers that own arrays and call ops, the blocks of the U, the U itself, and its loss."""
