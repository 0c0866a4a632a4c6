from __future__ import annotations

import pytest
import torch
from lolcats_kernels import HybridConfig
from lolcats_kernels.hf_student import LolcatsMixin
from lolcats_kernels.hybrid import hybrid_attention
from peft import LoraConfig, get_peft_model

from lolcats_cli.errors import BadInput, IdentityMismatch
from lolcats_cli.student.build import attention_modules, hybrid_modules, linearize, set_terms


def test_the_student_computes_hybrid_attention_with_the_given_maps(make_teacher, make_maps, tokens):
    """One layer, recomputed from the teacher's own q, k, v by the kernel."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config = HybridConfig(window=5, feature_dim=8)
    teacher, maps = make_teacher(num_hidden_layers=1), make_maps(config, layers=1)
    base = teacher.model
    layer = base.layers[0]
    hidden = base.embed_tokens(tokens)
    x = layer.input_layernorm(hidden)
    q, k, v = (
        proj(x).view(2, 23, -1, 16).transpose(1, 2)
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    cos, sin = base.rotary_emb(hidden, torch.arange(23)[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    y = hybrid_attention(q, k, v, maps[0], scaling=0.25, backend="reference")
    hidden = hidden + layer.self_attn.o_proj(y.transpose(1, 2).reshape(2, 23, 64))
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    expected = teacher.lm_head(base.norm(hidden))
    torch.testing.assert_close(linearize(teacher, config, maps)(tokens).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_window_over_everything_gives_back_the_softmax_teacher(make_teacher, make_maps, tokens):
    config = HybridConfig(window=64, feature_dim=8)
    expected = make_teacher()(tokens).logits
    student = linearize(make_teacher(), config, make_maps(config))
    torch.testing.assert_close(student(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_maps_may_be_state_dicts_and_are_copied(make_teacher, make_maps, tokens):
    config = HybridConfig(window=6, feature_dim=8)
    maps = make_maps(config)
    states = {layer: {k: v.clone() for k, v in m.state_dict().items()} for layer, m in maps.items()}
    one, two = linearize(make_teacher(), config, maps), linearize(make_teacher(), config, states)
    before = one(tokens).logits
    assert torch.equal(before, two(tokens).logits)
    maps[0].q_weight.data.zero_()
    assert torch.equal(before, one(tokens).logits)


def test_only_the_maps_are_new_and_they_are_fp32_and_frozen(make_teacher, make_maps):
    config = HybridConfig(window=6, feature_dim=8)
    teacher = make_teacher().bfloat16()
    names = set(teacher.state_dict())
    student = linearize(teacher, config, make_maps(config))
    new = {n: p for n, p in student.named_parameters() if n not in names}
    assert {n.rsplit(".", 1)[0] for n in new} == {f"model.layers.{i}.self_attn.hybrid" for i in range(2)}
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in new.values())
    assert student(torch.tensor([[5, 6, 7]])).logits.dtype == torch.bfloat16


def test_terms_change_the_output_and_back(make_student, tokens):
    student = make_student()
    both = student(tokens).logits
    results = {}
    for terms in ("window", "linear"):
        set_terms(student, terms)
        results[terms] = student(tokens).logits
        assert not torch.allclose(results[terms], both, atol=1e-2)
    assert torch.allclose(results["window"][:, :6], both[:, :6], atol=1e-5)  # within the first window nothing is older
    set_terms(student, "both")
    assert torch.equal(student(tokens).logits, both)
    with pytest.raises(ValueError, match="window, linear"):
        set_terms(student, "none")


def test_set_terms_refuses_a_teacher(make_teacher):
    with pytest.raises(BadInput, match="not a student"):
        set_terms(make_teacher(), "window")


@pytest.mark.parametrize("layers, message", [([0], "none for layers 1"), ([0, 1, 2], "for layers 2, which")])
def test_layers_that_do_not_fit_are_refused(make_teacher, make_maps, layers, message):
    config = HybridConfig(window=6, feature_dim=8)
    maps = make_maps(config, layers=3)
    with pytest.raises(IdentityMismatch, match=message):
        linearize(make_teacher(), config, {layer: maps[layer] for layer in layers})


def test_shapes_that_do_not_fit_are_refused_before_anything_changes(make_teacher, make_maps, tokens):
    teacher = make_teacher()
    before = teacher(tokens).logits
    with pytest.raises(IdentityMismatch, match="layer 0"):
        linearize(teacher, HybridConfig(window=6, feature_dim=8), make_maps(HybridConfig(window=6, feature_dim=4)))
    assert torch.equal(teacher(tokens).logits, before)


def test_a_student_is_not_linearized_again(make_student, make_maps):
    config = HybridConfig(window=6, feature_dim=8)
    with pytest.raises(BadInput, match="student already"):
        linearize(make_student(config), config, make_maps(config))


def test_a_model_outside_the_attention_interface_is_refused(make_maps):
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=64, n_layer=2, n_head=4))
    config = HybridConfig(window=6, feature_dim=8)
    with pytest.raises(BadInput, match="BloomForCausalLM"):
        linearize(bloom, config, make_maps(config))


def test_attention_weights_are_refused_with_the_reason(make_student, tokens):
    with pytest.raises(ValueError, match=r"output_attentions=True cannot be served: .* never has attention weights"):
        make_student()(tokens, output_attentions=True)


def test_softmax_attention_and_saving_are_refused(make_student, tmp_path):
    student = make_student()
    with pytest.raises(ValueError, match="lolcats"):
        student.set_attn_implementation("sdpa")
    with pytest.raises(BadInput, match="merge"):
        student.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_trains_the_projections_alone(make_student, tokens):
    student = make_student()
    peft = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert isinstance(student, LolcatsMixin) and len(attention_modules(peft)) == len(hybrid_modules(peft)) == 2
    peft(tokens, labels=tokens, use_cache=False).loss.backward()
    trained = {n for n, p in peft.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2 and all("lora_" in n for n in trained)
    for name, parameter in peft.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
        if "lora_B" in name:
            assert parameter.grad.abs().max() > 0, name


def test_training_under_trainer_and_generating_after(make_student, tokens, tmp_path):
    from transformers import Trainer, TrainingArguments

    peft = get_peft_model(make_student(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        tmp_path, max_steps=8, learning_rate=2e-2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True, use_cpu=True, gradient_checkpointing=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(peft, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    peft.eval()
    cached = peft.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, peft.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False))


def test_gradient_checkpointing_gives_the_same_gradients(make_student, tokens):
    gradients = []
    for checkpointing in (False, True):
        student = make_student().train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        student(tokens, labels=tokens).loss.backward()  # use_cache left at the configuration's True
        gradients.append(student.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)
