"""Megatron-core under our feet: device choice first, then groups, attention, norms, log-probs, reshard.

Importing this package chooses the device; on CPU that also adapts megatron-core (see `device.py`), which
must happen before the first `import megatron.core`.
"""

from mrlhf.parallel import device

device.adapt_megatron()
