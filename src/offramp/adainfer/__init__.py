"""Fits the classifiers of AdaInfer to traces, and judges them on texts they have not seen."""
