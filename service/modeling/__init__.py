"""The networks as nn.Modules, built from torchvision's parts. Knows nothing of files, settings, HTTP or batching."""
