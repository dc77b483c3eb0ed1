"""The networks as nn.Modules, composed from torchvision's parts. Knows nothing of files, settings, HTTP or batching."""
