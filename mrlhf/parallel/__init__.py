"""Process groups, the device, and the exchange of weights between layouts. See README.md.

Importing this package chooses the device and adapts megatron-core to it, before the first `import megatron.core`.
"""

from mrlhf.parallel import megatron

megatron.adapt()
