"""What a device can do and how it is used: the CPU in `cpu.py`, CUDA in `cuda.py`, each a `Device`. A new kind of
device takes one more file here and a line in `choosing.py`.
"""

from service.devices.choosing import choose_device, count_gpus, device_named, device_of
from service.devices.device import Clock, Device

__all__ = ["Clock", "Device", "choose_device", "count_gpus", "device_named", "device_of"]
