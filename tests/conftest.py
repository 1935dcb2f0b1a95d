"""Set-up shared by all tests."""

import os

# Triton reads this when it is first imported, so it must be set before any kernel is.
if not os.environ.get("REPRUNE_GPU_TESTS"):
    os.environ["TRITON_INTERPRET"] = "1"
