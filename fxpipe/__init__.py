"""fxpipe: a pipeline-parallelism compiler for PyTorch. Names load on first use; importing this costs no torch."""
