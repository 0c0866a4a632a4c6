"""Whose student this is: its classes in transformers. `lolcats merge` writes this file anew into a student's folder."""

CONFIG_CLASS = "LlamaConfig"
MODEL_CLASS = "LlamaForCausalLM"
MODEL_TYPE = "llama"
