"""Hunyuan, dense."""

from qsharded.models.families.family import Family, Settings, Values, rope_parameters
from qsharded.models.rope import RopeConfig


def _hunyuan(values: Values) -> Settings:
    attention = bool(values["attention_bias"])
    return {"qk_norm": True, "qk_norm_place": "rotated head", "qkv_bias": attention, "o_bias": attention}


def _hunyuan_rope(values: Values) -> Settings:
    """Its "dynamic" has a fixed ``alpha``, beside which nothing else counts."""
    given = rope_parameters(values)
    if (given.get("rope_type") or given.get("type")) == "dynamic" and given.get("alpha"):
        known = ("alpha", "rope_theta")
        given = {"rope_type": "ntk-alpha"} | {key: given[key] for key in known if key in given}
    return {"rope": RopeConfig.of(given, values)}


FAMILIES = {
    "hunyuan_v1_dense": Family(
        "Hunyuan (dense)",
        "HunYuanDenseV1ForCausalLM",
        "q and k normalised once they are rotated; a rotary base stretched by a fixed alpha",
        defaults={"rms_norm_eps": 1e-5, "attention_bias": False},
        settings=_hunyuan,
        neutral={
            "use_qk_norm": (True,),
            "use_cla": (False,),
            "add_classification_head": (False,),
            "norm_type": ("rms",),
        },
        ropes=_hunyuan_rope,
    ),
}
