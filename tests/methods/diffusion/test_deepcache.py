from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)

import gratis
from gratis.contract.errors import ParameterError, SubjectError
from gratis.methods.diffusion.deepcache import power_schedule
from tests import tiny_diffusion as tiny


@pytest.mark.parametrize(
    ("total", "interval", "centre", "keys"),
    [
        (50, 5, 15, [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]),
        (50, 10, 15, [0, 9, 17, 26, 37]),
        (20, 4, 6, [0, 4, 6, 10, 15]),
        (20, 5, 6, [0, 5, 8, 13]),
        (25, 5, 8, [0, 5, 8, 13, 18]),
    ],
)
def test_golden_schedules_around_a_centre(total, interval, centre, keys):
    assert power_schedule(total, interval, 1.4, centre) == keys
    method = gratis.DeepCache(schedule="power", interval=interval, centre=centre, steps=total)
    assert method.key_calls(total) == keys


def test_golden_schedule_without_a_centre():
    assert power_schedule(250, 10, 1.5, None) == [
        0, 1, 5, 10, 15, 22, 29, 37, 45, 53, 63, 72, 83, 93, 104, 116, 127, 140, 152, 165, 178, 192, 206, 220, 235,
    ]  # fmt: skip


def test_impossible_schedule():
    with pytest.raises(ParameterError, match="no power schedule"):
        gratis.DeepCache(schedule="power", interval=2, centre=3, steps=6)


@pytest.mark.parametrize("keys", [None, (1, 2), (0, 3, 3), (0, 5, 2), (0, 50)])
def test_explicit_keys(keys):
    with pytest.raises(ParameterError, match="keys must"):
        gratis.DeepCache(schedule="explicit", keys=keys, steps=50)
    with pytest.raises(ParameterError, match="explicit"):
        gratis.DeepCache(keys=(0, 1))


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_retrieval_call_on_the_same_input_equals_the_key_call_for_every_skip(layers):
    unet = tiny.tiny_unet(layers)
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 16)
    plain = unet(x, 500, text).sample
    skips = 1 + 3 * layers + 2
    for skip in range(skips):
        with gratis.attach(unet, gratis.DeepCache(interval=2, skip=skip)) as handle:
            assert torch.equal(unet(x, 500, text).sample, plain)
            assert torch.equal(unet(x, 500, text).sample, plain)
            assert handle.report()["deepcache"]["shallow_calls"] == 1
    with pytest.raises(SubjectError, match=f"must be below {skips}"):
        gratis.attach(unet, gratis.DeepCache(skip=skips))


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 2, 4])
def test_unconditional_unet(skip):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    plain = unet(x, 10).sample
    with gratis.attach(unet, gratis.DeepCache(interval=3, skip=skip)):
        for _ in range(3):
            assert torch.equal(unet(x, 10).sample, plain)


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 2, 5])
def test_video_unets(skip):
    torch.manual_seed(0)
    motion = UNetMotionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=2,
    ).eval()  # fmt: skip
    temporal = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), cross_attention_dim=16,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=(2, 2),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=2,
    ).eval()  # fmt: skip
    inputs = {
        motion: (torch.randn(1, 4, 2, 8, 8), 500, torch.randn(2, 7, 16)),
        temporal: (torch.randn(1, 2, 4, 8, 8), 500, torch.randn(1, 1, 16), torch.zeros(1, 3)),
    }
    for unet, given in inputs.items():
        plain = unet(*given).sample
        with gratis.attach(unet, gratis.DeepCache(interval=2, skip=skip)) as handle:
            assert torch.equal(unet(*given).sample, plain)
            assert torch.equal(unet(*given).sample, plain)
            assert handle.report()["deepcache"]["shallow_calls"] == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    unet = tiny.tiny_unet().to(dtype)
    x, text = torch.randn(1, 4, 16, 16, dtype=dtype), torch.randn(1, 7, 16, dtype=dtype)
    plain = unet(x, 500, text).sample
    with gratis.attach(unet, gratis.DeepCache(interval=2, skip=1)):
        for _ in range(2):
            assert torch.equal(unet(x, 500, text).sample, plain)


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 3, 5])
def test_free_u_writes_into_hidden_states(skip):
    unet = tiny.tiny_unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 16)
    plain = unet(x, 500, text).sample
    with gratis.attach(unet, gratis.DeepCache(interval=2, skip=skip)) as handle:
        for _ in range(2):
            assert torch.equal(unet(x, 500, text).sample, plain)
        assert handle.report()["deepcache"]["shallow_calls"] == 1


def counted(unet, skip):
    """How often each module ran in the second of two calls."""
    ran = []
    handles = [
        m.register_forward_hook(lambda m, a, o, n=n: ran.append(n))
        for n, m in unet.named_modules()
        if not list(m.children())
    ]
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 16)
    with torch.no_grad(), gratis.attach(unet, gratis.DeepCache(interval=2, skip=skip)):
        unet(x, 500, text)
        ran.clear()
        unet(x, 490, text)
    [h.remove() for h in handles]
    return ran


def test_the_encoder_runs_only_down_to_the_skip_and_the_middle_not_at_all():
    ran = counted(tiny.tiny_unet(), 0)
    assert not [n for n in ran if n.startswith(("mid_block", "down_blocks", "up_blocks.0", "up_blocks.1"))]
    assert not [n for n in ran if n.startswith(("up_blocks.2.resnets.0", "up_blocks.2.resnets.1"))]
    assert [n for n in ran if n.startswith("up_blocks.2.resnets.2")]
    assert [n for n in ran if n.startswith("time_embedding")]
    ran = counted(tiny.tiny_unet(), 2)
    assert {n.split(".")[3] for n in ran if n.startswith("down_blocks.0.resnets")} == {"0", "1"}
    assert not [n for n in ran if n.startswith(("down_blocks.0.downsamplers", "down_blocks.1"))]
    ran = counted(tiny.tiny_unet(), 3)
    assert [n for n in ran if n.startswith("down_blocks.0.downsamplers")]


@torch.no_grad()
def test_skips_and_time_are_fresh_in_between():
    unet = tiny.tiny_unet()
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 16)
    with gratis.attach(unet, gratis.DeepCache(interval=9, skip=1)):
        first = unet(x, 500, text).sample
        assert not torch.equal(unet(x + 0.1, 500, text).sample, first)
        assert not torch.equal(unet(x, 400, text).sample, first)


@pytest.mark.parametrize(("scheduler", "calls"), [(PNDMScheduler, 6), (HeunDiscreteScheduler, 9)])
def test_calls_are_counted_where_timesteps_repeat(scheduler, calls):
    pipeline = tiny.tiny_pipeline()
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    with gratis.attach(pipeline, gratis.DeepCache(interval=2)) as handle:
        tiny.run(pipeline, steps=5)
        report = handle.report()["deepcache"]
    assert report["calls"] == calls
    assert report["whole_calls"] == -(-calls // 2)
    assert report["generations"] == 1


def test_every_generation_starts_whole_and_equals_a_fresh_one():
    pipeline = tiny.tiny_pipeline()
    with gratis.attach(pipeline, gratis.DeepCache(interval=4)):
        first = tiny.run(pipeline)
    with gratis.attach(pipeline, gratis.DeepCache(interval=4)) as handle:
        tiny.run(pipeline, seed=5, steps=5)
        again = tiny.run(pipeline)
        assert handle.report()["deepcache"]["generations"] == 2
    assert torch.equal(first, again)


def test_a_power_schedule_counts_the_steps_that_a_picture_start_leaves():
    from diffusers import StableDiffusionImg2ImgPipeline

    made = StableDiffusionImg2ImgPipeline(**tiny.tiny_pipeline().components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    options = {
        "prompt_embeds": torch.randn(1, 7, 16), "negative_prompt_embeds": torch.randn(1, 7, 16),
        "image": torch.rand(1, 3, 32, 32), "num_inference_steps": 50, "strength": 0.5, "output_type": "latent",
    }  # fmt: skip
    with gratis.attach(made, gratis.DeepCache(schedule="power", interval=5, centre=8)) as handle:
        for _ in range(2):
            made(**options, generator=torch.Generator().manual_seed(0))
        report = handle.report()["deepcache"]
    assert (report["calls"], report["whole_calls"], report["generations"]) == (50, 10, 2)


def test_few_steps_and_fresh_noise_are_warned_of_once():
    pipeline = tiny.tiny_pipeline()
    with gratis.attach(pipeline, gratis.DeepCache(interval=2)):
        with pytest.warns(UserWarning, match="6 calls of the U-Net are few"):
            tiny.run(pipeline)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            tiny.run(pipeline)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    with gratis.attach(pipeline, gratis.DeepCache(interval=2)), pytest.warns(UserWarning, match="EulerAncestral"):
        tiny.run(pipeline, steps=20, generator=torch.Generator().manual_seed(0))
    with gratis.attach(pipeline, gratis.DeepCache(interval=1)), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny.run(pipeline)


def test_a_compiled_unet_is_refused():
    unet = tiny.tiny_unet()
    unet.compile()
    with pytest.raises(SubjectError, match="before the U-Net is compiled"):
        gratis.attach(unet, gratis.DeepCache())
    with pytest.raises(SubjectError, match="DataParallel"):
        gratis.attach(torch.nn.DataParallel(tiny.tiny_unet()), gratis.DeepCache())


def test_an_exception_in_the_loop_leaves_the_next_generation_whole():
    pipeline = tiny.tiny_pipeline()
    plain = tiny.run(pipeline)

    def stop(pipe, i, t, kwargs):
        if i == 2:
            raise RuntimeError("stop")
        return kwargs

    with gratis.attach(pipeline, gratis.DeepCache(interval=3)):
        expected = tiny.run(pipeline)
        with pytest.raises(RuntimeError, match="stop"):
            tiny.run(pipeline, callback_on_step_end=stop)
        assert torch.equal(tiny.run(pipeline), expected)
    assert torch.equal(tiny.run(pipeline), plain)


@torch.no_grad()
def test_conditional_and_unconditional_calls_of_one_step_do_not_share():
    pipeline = tiny.tiny_pipeline()
    x = torch.randn(1, 4, 16, 16)
    a, b = torch.randn(1, 7, 16), torch.randn(1, 7, 16)
    plain = [pipeline.unet(x, 500, text).sample for text in (a, b)]
    pipeline.scheduler.set_timesteps(4)
    with gratis.attach(pipeline, gratis.DeepCache(interval=2)) as handle:
        pipeline.unet(x, 500, a), pipeline.unet(x, 500, b)
        pipeline.scheduler.step(x, pipeline.scheduler.timesteps[0], x)
        assert torch.equal(pipeline.unet(x, 500, a).sample, plain[0])
        assert torch.equal(pipeline.unet(x, 500, b).sample, plain[1])
        assert handle.report()["deepcache"]["shallow_calls"] == 2


@torch.no_grad()
def test_conditions_of_one_step_do_not_share_on_a_bare_unet():
    unet = tiny.tiny_unet()
    x = torch.randn(1, 4, 16, 16)
    a, b = torch.randn(1, 7, 16), torch.randn(1, 7, 16)
    plain = {(t, c): unet(x, t, text).sample for t in (500, 400) for c, text in enumerate((a, b))}
    with gratis.attach(unet, gratis.DeepCache(interval=2)) as handle:
        for c, text in enumerate((a, b)):
            assert torch.equal(unet(x.clone(), 500, encoder_hidden_states=text).sample, plain[500, c])
        caches = handle.report()["deepcache"]["peak_cache_bytes"]
        assert caches == 2 * 16 * 16 * 16 * 4
        shallow = [unet(x, 400, encoder_hidden_states=text).sample for text in (a, b)]
        assert handle.report()["deepcache"]["shallow_calls"] == 2
    with gratis.attach(unet, gratis.DeepCache(interval=2)):
        for out, text in zip(shallow, (a, b), strict=True):
            unet(x, 500, text)
            assert torch.equal(unet(x, 400, text).sample, out)
    # A sampler's second evaluation at one timestep has another sample, and is the next call of the same condition.
    with gratis.attach(unet, gratis.DeepCache(interval=2)) as handle:
        for sample in (x, x + 0.1):
            for text in (a, b):
                unet(sample, 500, text)
        assert handle.report()["deepcache"]["shallow_calls"] == 2


@torch.no_grad()
def test_one_tensor_is_kept_per_context():
    unet = tiny.tiny_unet()
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 16)
    with gratis.attach(unet, gratis.DeepCache(interval=2)) as handle:
        unet(x, 500, text)
        assert handle.report()["deepcache"]["peak_cache_bytes"] == 2 * 16 * 16 * 16 * 4


@torch.no_grad()
def test_control_residuals_reach_the_skips_that_run():
    unet = tiny.tiny_unet()
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 16)
    shapes = []
    handles = [unet.conv_in.register_forward_hook(lambda m, a, o: shapes.append(o.shape))]
    for block in unet.down_blocks:
        handles.append(block.register_forward_hook(lambda m, a, o: shapes.extend(s.shape for s in o[1])))
    handles.append(unet.mid_block.register_forward_hook(lambda m, a, o: shapes.append(o.shape)))
    unet(x, 500, text)
    [h.remove() for h in handles]
    residuals = [0.1 * torch.randn(s) for s in shapes]
    options = {
        "down_block_additional_residuals": tuple(residuals[:-1]),
        "mid_block_additional_residual": residuals[-1],
    }
    plain = unet(x, 500, text, **options).sample
    with gratis.attach(unet, gratis.DeepCache(interval=2, skip=2)):
        assert torch.equal(unet(x, 500, text, **options).sample, plain)
        assert torch.equal(unet(x, 500, text, **options).sample, plain)


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 2, 5])
def test_adapters_write_into_hidden_states(skip):
    unet = tiny.tiny_unet()
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 16)
    sizes = [(1, 16, 16, 16), (1, 32, 8, 8), (1, 32, 4, 4)]
    features = [0.3 * torch.randn(size) for size in sizes]

    def call():
        return unet(x, 500, text, down_intrablock_additional_residuals=[f.clone() for f in features]).sample

    plain = call()
    assert not torch.equal(plain, unet(x, 500, text).sample)
    with gratis.attach(unet, gratis.DeepCache(interval=2, skip=skip)) as handle:
        assert torch.equal(call(), plain)
        assert torch.equal(call(), plain)
        assert handle.report()["deepcache"]["shallow_calls"] == 1


def test_it_comes_off_in_any_order_with_other_hooks():
    from diffusers.hooks import HookRegistry, ModelHook

    class Scale(ModelHook):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def new_forward(self, module, *args, **kwargs):
            return self.by * self.fn_ref.original_forward(*args, **kwargs)

    plain = tiny.run(tiny.tiny_pipeline())
    for order in itertools.permutations(["deepcache", "hook"]):
        pipeline = tiny.tiny_pipeline()
        registry = HookRegistry.check_if_exists_or_initialize(pipeline.unet.conv_in)
        handle = gratis.attach(pipeline, gratis.DeepCache(interval=2))
        registry.register_hook(Scale(1.0), "scale")
        tiny.run(pipeline)
        for what in order:
            handle.detach() if what == "deepcache" else registry.remove_hook("scale")
            tiny.run(pipeline)
        assert torch.equal(tiny.run(pipeline), plain)


def test_copies_and_pickles_of_an_attached_model_are_refused():
    pipeline = tiny.tiny_pipeline()
    with gratis.attach(pipeline, gratis.DeepCache(interval=2)):
        with pytest.raises(SubjectError, match="Detach DeepCache"):
            copy.deepcopy(pipeline.unet)
        with pytest.raises(SubjectError, match="Detach DeepCache"):
            pickle.dumps(pipeline.unet)
        with pytest.raises(SubjectError, match="already"):
            gratis.attach(pipeline.unet, gratis.DeepCache(interval=2))
    copy.deepcopy(pipeline.unet)


def test_subjects_without_long_skips_are_refused():
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    with pytest.raises(SubjectError, match="FluxTransformer2DModel"):
        gratis.attach(transformer, gratis.DeepCache())
    skip = UNet2DModel(
        sample_size=16, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8,
        down_block_types=("SkipDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "SkipUpBlock2D"),
    )  # fmt: skip
    with pytest.raises(SubjectError, match="SkipDownBlock2D"):
        gratis.attach(skip.eval(), gratis.DeepCache())
    with pytest.raises(SubjectError, match="needs steps"):
        gratis.attach(tiny.tiny_unet(), gratis.DeepCache(schedule="power"))


def test_a_power_schedule_takes_its_length_from_the_scheduler():
    pipeline = tiny.tiny_pipeline()
    method = gratis.DeepCache(schedule="power", interval=5, centre=8)
    with gratis.attach(pipeline, method) as handle:
        tiny.run(pipeline, steps=25)
        assert handle.report()["deepcache"]["whole_calls"] == 5


def test_gradients_in_training_mode_are_refused():
    unet = tiny.tiny_unet().train()
    with gratis.attach(unet, gratis.DeepCache(interval=2)), pytest.raises(ValueError, match=r"unet\.eval"):
        unet(torch.randn(1, 4, 16, 16), 500, torch.randn(1, 7, 16))
