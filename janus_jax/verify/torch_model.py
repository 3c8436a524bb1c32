"""Runs Janus in `transformers` on the CPU for `python -m convert verify`.

In the package, only this module and the check in run.py that torch is installed import torch.
outputs.py documents the methods and the shapes of their arrays.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from janus_jax.processing.images import preprocess_generation
from janus_jax.verify.outputs import GUIDANCE_WEIGHT, Greedy, Prepared, Request

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Returns a tensor as float32 or, if its values are integers, int32."""
    return x.detach().to(torch.float32 if x.is_floating_point() else torch.int32).numpy()


class TorchJanus:
    """An Implementation (outputs.py) with the model and processor of `transformers`."""

    def __init__(self, folder: Path, dtype: str):
        """Loads a folder in the layout of `transformers`.

        Raises:
          ValueError: weights are missing or have other shapes.
        """
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.dtype = DTYPES[dtype]
        model, info = transformers.JanusForConditionalGeneration.from_pretrained(
            folder, dtype=self.dtype, local_files_only=True, output_loading_info=True
        )
        if names := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            verb = "is" if len(names) == 1 else "are"
            raise ValueError(
                f"{folder}: {len(names)} of the model's weights {verb} missing or of another "
                f"shape: {', '.join(names[:3])}; use a complete checkpoint"
            )
        self.model = model.eval().requires_grad_(False)
        # Pillow resizes in both implementations: torchvision's bicubic filter differs slightly.
        self.processor = transformers.AutoProcessor.from_pretrained(
            folder, local_files_only=True, backend="pil"
        )
        # Older releases of transformers expand an image to 576 tokens, regardless of the config.
        self.processor.num_image_tokens = model.config.vision_config.num_image_tokens
        self.tokenizer = self.processor.tokenizer

    def prepare(self, request: Request) -> Prepared:
        parts = [{"type": "image"}, {"type": "text", "text": request.question}]
        question = self._apply_template(parts)
        inputs = self.processor(text=[question], images=[request.image])
        prompt = self._apply_template([{"type": "text", "text": request.prompt}])
        image_prompt = self.processor(text=[prompt], generation_mode="image")
        return Prepared(
            np.asarray(inputs["input_ids"][0], np.int32),
            np.asarray(image_prompt["input_ids"][0], np.int32),
            np.moveaxis(np.asarray(inputs["pixel_values"][0], np.float32), 0, -1),
        )

    def _apply_template(self, content: list[dict]) -> str:
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def _channels_first(self, x: np.ndarray) -> torch.Tensor:
        """Converts [S, S, 3] to [1, 3, S, S] in the model's dtype."""
        return torch.tensor(np.moveaxis(x, -1, 0)[None].copy(), dtype=self.dtype)

    def siglip_features(self, pixels: np.ndarray) -> np.ndarray:
        tower = self.model.model.vision_model
        return to_numpy(tower(self._channels_first(pixels)).last_hidden_state[0])

    def align(self, features: np.ndarray) -> np.ndarray:
        return to_numpy(self.model.model.aligner(torch.tensor(features, dtype=self.dtype)))

    def vq_latents(self, image: Image.Image) -> np.ndarray:
        vq = self.model.model.vqmodel
        size = self.model.config.vision_config.image_size
        pixels = self._channels_first(preprocess_generation(image, size))
        return np.moveaxis(to_numpy(vq.quant_conv(vq.encoder(pixels)))[0], 0, -1)

    def vq_indices(self, image: Image.Image) -> np.ndarray:
        """Normalizes latents and codes like DeepSeek's code; `transformers` omits this step."""
        normalize = torch.nn.functional.normalize
        latents = torch.tensor(self.vq_latents(image).copy())
        latents = normalize(latents.reshape(-1, latents.shape[-1]), dim=-1)
        codes = normalize(self.model.model.vqmodel.quantize.embedding.weight.float(), dim=-1)
        return to_numpy(torch.argmin(torch.cdist(latents, codes), dim=-1))

    def vq_decode(self, indices: np.ndarray) -> np.ndarray:
        indices = torch.tensor(indices[None], dtype=torch.long)
        return np.moveaxis(to_numpy(self.model.model.vqmodel.decode(indices))[0], 0, -1)

    def _embed(self, tokens: np.ndarray) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor(tokens, dtype=torch.long))

    def _hidden(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.model.model.language_model(
            inputs_embeds=embeds, use_cache=False
        ).last_hidden_state

    def text_logits(self, tokens: np.ndarray, aligned: np.ndarray, last: int) -> np.ndarray:
        embeds = self._embed(tokens)
        image_mask = torch.tensor(tokens == self.model.config.image_token_id)
        embeds[image_mask] = torch.tensor(aligned, dtype=self.dtype)
        return to_numpy(self.model.lm_head(self._hidden(embeds[None])[0, -last:]))

    def image_logits(self, image_prompt: np.ndarray, indices: np.ndarray) -> np.ndarray:
        unconditional = np.full_like(image_prompt, self.tokenizer.pad_token_id)
        unconditional[[0, -1]] = image_prompt[[0, -1]]
        embeds = self._embed(np.stack([image_prompt, unconditional]))
        codes = torch.tensor(np.stack([indices, indices]), dtype=torch.long)
        codes = self.model.prepare_embeddings_for_image_generation(codes)
        hidden = self._hidden(torch.cat([embeds, codes], dim=1))
        return to_numpy(self.model.model.generation_head(hidden[:, len(image_prompt) - 1 :]))

    def _generation_config(self, **settings) -> transformers.GenerationConfig:
        tokenizer = self.tokenizer
        return transformers.GenerationConfig(
            do_sample=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )

    def greedy_answer(self, prepared: Prepared, max_new_tokens: int) -> Greedy:
        tokens = torch.tensor(prepared.tokens[None], dtype=torch.long)
        settings = dict(max_new_tokens=max_new_tokens, output_logits=True)
        output = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=self._channels_first(prepared.pixels),
            generation_config=self._generation_config(return_dict_in_generate=True, **settings),
        )
        new = output.sequences[0, tokens.shape[1] :]
        return Greedy(to_numpy(new), np.concatenate([to_numpy(row) for row in output.logits]))

    def greedy_image(self, prepared: Prepared, num_tokens: int) -> Greedy:
        tokens = torch.tensor(prepared.image_prompt[None], dtype=torch.long)
        logits = []
        vision = self.model.model.vision_model.config
        hook = self.model.model.generation_head.register_forward_hook(
            lambda module, inputs, output: logits.append(to_numpy(output))
        )
        # `generate` has no argument for the number of image tokens; it reads this setting.
        total, vision.num_image_tokens = vision.num_image_tokens, num_tokens
        try:
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_mode="image",
                generation_config=self._generation_config(
                    guidance_scale=GUIDANCE_WEIGHT,
                    generation_kwargs={"boi_token_id": int(tokens[0, -1])},
                ),
            )
        finally:
            vision.num_image_tokens = total
            hook.remove()
        cond, uncond = np.moveaxis(np.stack(logits), 1, 0)
        return Greedy(to_numpy(output[0]), uncond + np.float32(GUIDANCE_WEIGHT) * (cond - uncond))
