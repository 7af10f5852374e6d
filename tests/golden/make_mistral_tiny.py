"""Makes mistral_tiny.npz: weights, tokens and logits of a tiny random Hugging Face Mistral.

Needs torch, which the project does not: pip install torch transformers && python tests/golden/make_mistral_tiny.py
"""

import pathlib

import numpy as np
import torch
import transformers

SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, sliding_window=6, rms_norm_eps=1e-5, max_position_embeddings=64,
             tie_word_embeddings=False)


def main():
  torch.manual_seed(0)
  config = transformers.MistralConfig(**SHAPE, attn_implementation='eager')
  model = transformers.MistralForCausalLM(config).eval().float()
  with torch.no_grad():
    for parameter in model.parameters():  # the default initialisation is too small to tell mistakes apart
      parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    tokens = torch.randint(0, SHAPE['vocab_size'], (2, 20))
    logits = model(tokens).logits
  arrays = {name: value.numpy() for name, value in model.state_dict().items()}
  theta = model.config.rope_parameters['rope_theta']
  np.savez_compressed(pathlib.Path(__file__).with_name('mistral_tiny.npz'), tokens=tokens.numpy(),
                      logits=logits.numpy(), rope_theta=theta, **arrays)


if __name__ == '__main__':
  main()
