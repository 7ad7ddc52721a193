"""What ranks need, imported once before they are forked; nothing is computed here, and no thread is started."""

import contextlib
import gc
import importlib

NEEDED = (
    "fxpipe.pipeline",
    "fxpipe.compiler",
    "fxpipe.materialize",
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining.schedules",
    "torch.nn.parallel",
    "torch.utils.checkpoint",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.t5.modeling_t5",
)
for _name in NEEDED:
    with contextlib.suppress(ImportError):  # a rank that needs it says so
        importlib.import_module(_name)
gc.freeze()  # what is imported stays; a rank that looks for garbage need not touch, and so copy, its memory
