"""Our models for people who write transformers: importing this registers them with the Auto classes.

    import kimi_mm.hf
    from transformers import AutoModel, AutoProcessor
    processor, model = AutoProcessor.from_pretrained(DIR), AutoModel.from_pretrained(DIR)
    inputs = processor([{"role": "user", "content": [{"type": "audio", "audio": "speech.wav"}]}])
    print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64)))

DIR is what `kimi-mm convert nano DIR --to transformers` writes. No remote code: the code is this package.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from kimi_mm.hf.configuration import KimiMMConfig
from kimi_mm.hf.modeling import KimiMMForConditionalGeneration
from kimi_mm.hf.processing import KimiMMProcessor

AutoConfig.register(KimiMMConfig.model_type, KimiMMConfig, exist_ok=True)
AutoModel.register(KimiMMConfig, KimiMMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(KimiMMConfig, KimiMMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(KimiMMConfig, KimiMMProcessor, exist_ok=True)

__all__ = ["KimiMMConfig", "KimiMMForConditionalGeneration", "KimiMMProcessor"]
