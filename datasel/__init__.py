"""datasel: choosing what language models are pre-trained on, in JAX.

The step functions are public API and need nothing but arrays:

  datasel.step.train_step, datasel.step.State     one update of any model under any objective
  datasel.objectives                              the losses (nats per token)
  datasel.methods.doremi.domain_weights.update    one Group DRO step on the domain weights

Importing `datasel` imports no jax; import the module you need.
"""

__version__ = '0.1.0'
