"""Gramian methods: weights from the K x K inner products of the task gradients."""
