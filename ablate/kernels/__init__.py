"""The layer itself: its definition, its kernels, and one public function, `op.tree_feedforward`."""
