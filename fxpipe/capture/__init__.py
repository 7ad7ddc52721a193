"""From a model on the meta device to a LayerGraph and the FX graphs of its stages."""
