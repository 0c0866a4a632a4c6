"""Whose student this is: its classes in transformers. `lolcats merge` writes this file anew into a student's folder."""

CONFIG_CLASS = "LlamaConfig"
MODEL_CLASS = "LlamaForCausalLM"
BASE_CLASS = "LlamaModel"  # without the head; None where transformers has no such class
MODEL_TYPE = "llama"
