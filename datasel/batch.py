"""The batch: a dict of arrays, the one thing that data, objectives and models agree on.

Shape letters, used in names throughout (`tokens_BxL`, `alpha_M`):
  B batch     L length     D model width   H query heads   K key/value heads   Dh head width   F feed-forward width
  V vocabulary   M domains   N examples    P proxies       T inner steps       (the count of layers is `n_layers`)

Keys.  A key that is absent is absent: nobody passes dummies.
  tokens_BxL          int32    inputs
  targets_BxL         int32    the token to predict at each position
  loss_mask_BxL       float32  1 where the target counts, 0 elsewhere (padding, a document's end)
  segment_BxL         int32    which document of the packed row a token belongs to, from 1; 0 is padding
  position_BxL        int32    position inside that document, for RoPE
  protected_BxL       bool     tokens that all later ones of their document see, whatever the anchors (AnLLM)
  domain_B            int32    index of the row's domain in the store's sorted list of domains
  example_B           int64    the row's record number in its domain, in the store or selection that it was read from
  weights_B           float32  weight of each example in the loss (PDS)
  reference_nll_BxL   float32  nats per token under the reference model (DoReMi)
"""

# Stay on the host: jax has no int64 by default and would cut them silently.
HOST_KEYS = ('example_B',)

Batch = dict
