"""From a LayerGraph to a PipelinePlan; imports no torch."""
