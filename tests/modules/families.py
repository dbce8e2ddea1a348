"""A tiny checkpoint of every family: the real classes, with weights by chance that look at picture and prompt."""

from __future__ import annotations

import functools

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SUPPORTS = {
    "llava_onevision": ("text", "image", "images", "film"),
    "llava_next": ("text", "image", "images"),
    "qwen2_vl": ("text", "image", "images", "film"),
    "qwen2_5_vl": ("text", "image", "images", "film"),
    "internvl": ("text", "image", "images", "film"),
    "idefics3": ("text", "image", "images"),
    "smolvlm": ("text", "image", "images", "film"),
    "gemma3": ("text", "image", "images"),
}
"""What a prompt may hold; gemma3 is here because its layers look back through a window and over whole pictures."""
TIED = ("qwen2_5_vl", "gemma3")
"""Families whose head is the embedding of the tokens."""

SIDE, PATCH, WIDTH = 28, 7, 48
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56]]
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CORPUS = [
    "the cat sat on the mat and looked at a red square and a blue circle",
    "What is shown in this picture? It is a green ring, I think.",
    "Compare both of them. Does it move to the left? No, it rests. Yes, it moves up and down.",
    "user assistant system You are a helpful assistant. Frame1: Frame2: 0123456789",
]


def tokenizer(named, extra=(), end="<|im_end|>"):
    """A tokenizer with the family's tokens under the names that its processor asks for."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values(), *extra]
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340 + len(special), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(CORPUS, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        eos_token=end,
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(named),
        model_max_length=4096,
    )


def template(image, film="", end="<|im_end|>"):
    """A chat template in the manner of ChatML."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'video' %}" + film + ""
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}" + end + "\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def text_config(words, **options):
    """The part of a configuration that every language model takes."""
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None}
    return TEXT | ends | {"vocab_size": len(words)} | options


def lively(kind, config, seed):
    """An untrained model whose log-probs differ from token to token, and with what it is shown."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config)
        head = model.get_output_embeddings().weight
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(std=(2.0 if parameter is head else 1.0) / fan_in**0.5)
        for name, parameter in model.named_parameters():
            if name.endswith("image_newline"):
                parameter.normal_()
    return model.eval()


def llava_onevision():
    """Tiles by anyres, a vector behind every line of patches, films pooled."""
    words = tokenizer({"image_token": "<image>", "video_token": "<video>"})
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=hf.Qwen2Config(**text_config(words)),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer=words,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n", "<video>\n"),
    )
    return lively(hf.LlavaOnevisionForConditionalGeneration, config, 1), processor


def llava_next():
    """Tiles by anyres, from the last layer but one of a CLIP whose class token is left out."""
    words = tokenizer({"image_token": "<image>"})
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=hf.MistralConfig(**text_config(words), sliding_window=None),
        image_token_index=words.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    processor = hf.LlavaNextProcessor(
        image_processor=hf.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return lively(hf.LlavaNextForConditionalGeneration, config, 2), processor


def qwen_words():
    """The tokens of Qwen2-VL and Qwen2.5-VL."""
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return tokenizer(named, ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"])


def qwen_config(words, kind, tied, **vision):
    """A configuration of either, with positions of three kinds."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    shared = {"depth": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}
    return kind(
        text_config=text_config(words, rope_parameters=rope),
        vision_config=shared | vision,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def qwen_processor(words, kind):
    """Pictures in their own shape, four patches to a token."""
    options = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
    film = size | {"longest_edge": 32 * SIDE**2}
    return kind(
        image_processor=hf.Qwen2VLImageProcessor(**options, size=size),
        tokenizer=words,
        video_processor=hf.Qwen2VLVideoProcessor(**options, size=film, cap_pixels_per_frame=True),
        chat_template=template(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
        ),
    )


def qwen2_vl():
    """Positions by time, height and width."""
    words = qwen_words()
    vision = {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2}
    config = qwen_config(words, hf.Qwen2VLConfig, tied=False, **vision)
    return lively(hf.Qwen2VLForConditionalGeneration, config, 3), qwen_processor(words, hf.Qwen2VLProcessor)


def qwen2_5_vl():
    """The same, with windows in the vision tower; the head is tied."""
    words = qwen_words()
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": WIDTH, "fullatt_block_indexes": [1]}
    config = qwen_config(words, hf.Qwen2_5_VLConfig, tied=True, **vision, window_size=SIDE)
    return lively(hf.Qwen2_5_VLForConditionalGeneration, config, 4), qwen_processor(words, hf.Qwen2_5_VLProcessor)


def internvl():
    """Pictures cut into tiles with a thumbnail; the frames of a film are tiles too."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(named)
    tile = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    config = hf.InternVLConfig(
        text_config=text_config(words, model_type="qwen2"),
        vision_config=VISION | tile,
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer=words,
        video_processor=hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
    )
    return lively(hf.InternVLForConditionalGeneration, config, 5), processor


IDEFICS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
}
IDEFICS_SPLIT = {
    "size": {"longest_edge": 2 * SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "do_image_splitting": True,
}


def idefics_words(**named):
    """The tokens of Idefics3 and SmolVLM, one for every place that a tile can have."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    return tokenizer(IDEFICS | named, places, end="<end_of_utterance>")


def idefics_config(words, kind):
    """A configuration of either."""
    return kind(
        text_config=text_config(words, model_type="llama"),
        vision_config=VISION | {"image_size": SIDE, "patch_size": PATCH},
        image_token_id=words.image_token_id,
        scale_factor=2,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )


def idefics3():
    """Pictures split into rows and columns of tiles, filled up per prompt."""
    words = idefics_words()
    config = idefics_config(words, hf.Idefics3Config)
    processor = hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(**IDEFICS_SPLIT),
        tokenizer=words,
        image_seq_len=4,
        chat_template=template("<image>", end="<end_of_utterance>"),
    )
    return lively(hf.Idefics3ForConditionalGeneration, config, 6), processor


def smolvlm():
    """The same, and a film is told frame by frame; its chat template for films is the one of the library."""
    words = idefics_words(video_token="<video>")
    config = idefics_config(words, hf.SmolVLMConfig)
    film = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(**IDEFICS_SPLIT),
        tokenizer=words,
        video_processor=hf.SmolVLMVideoProcessor(**film, num_frames=4, fps=1),
        image_seq_len=4,
        chat_template=template("<image>", "<video>", end="<end_of_utterance>"),
    )
    return lively(hf.SmolVLMForConditionalGeneration, config, 7), processor


def gemma3():
    """Layers with a window, and pictures whose tokens look at each other both ways; the head is tied."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer(named)
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    text = text_config(words, num_hidden_layers=3, head_dim=12, sliding_window=16, layer_types=layers)
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=VISION | {"image_size": SIDE, "patch_size": PATCH, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        tie_word_embeddings=True,
    )
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size=SQUARE),
        tokenizer=words,
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )
    return lively(hf.Gemma3ForConditionalGeneration, config, 8), processor


BUILD = {
    "llava_onevision": llava_onevision,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
}
"""From the name, which is `model_type` in the configuration, to a new model and its processor."""


@functools.cache
def built(name):
    """Model and processor, made once; for tests that change neither."""
    return BUILD[name]()


def saved(name, folder):
    """The checkpoint as a folder, as it would come from a hub."""
    model, processor = built(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
