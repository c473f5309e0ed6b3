"""Multimodal models of which the text part is computed."""

from qsharded.models.families.family import Wrapper

_QWEN3_5_IMAGES = frozenset({"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"})

WRAPPERS: dict[str, Wrapper] = {
    "qwen3_5": Wrapper(
        "Qwen3.5, multimodal",
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5_text",
        tied=False,
        keys=_QWEN3_5_IMAGES,
    ),
    "qwen3_5_moe": Wrapper(
        "Qwen3.5 MoE, multimodal",
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe_text",
        tied=False,
        keys=_QWEN3_5_IMAGES,
    ),
    "mistral3": Wrapper(
        "Mistral Small 3.1 and Ministral 3, multimodal",
        "Mistral3ForConditionalGeneration",
        "mistral",
        tied=True,
        keys=frozenset(
            {
                "image_token_index",
                "image_token_id",
                "projector_hidden_act",
                "vision_feature_layer",
                "multimodal_projector_bias",
                "spatial_merge_size",
            }
        ),
    ),
    "gemma3": Wrapper(
        "Gemma 3, multimodal",
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        tied=True,
        keys=frozenset(
            {"mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index", "image_token_id"}
        ),
    ),
}
