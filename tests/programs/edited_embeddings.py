"""Between tokens and text encoder there is a table of vectors: mix two words there, and generate the mixture."""

import torch
from diffusers import StableDiffusionPipeline


def body(text_encoder):
    """Older versions of transformers keep the encoder's pieces one level deeper."""
    return getattr(text_encoder, "text_model", text_encoder)


def run(text_encoder, vectors):
    """Vectors of tokens -> the text encoder's output, its first step left out."""
    encoder = body(text_encoder)
    places = encoder.embeddings.position_ids[:, : vectors.shape[1]]
    x = vectors + encoder.embeddings.position_embedding(places)
    return encoder.final_layer_norm(encoder.encoder(inputs_embeds=x, is_causal=True)[0])


@torch.no_grad()
def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    tokenizer, text_encoder = pipe.tokenizer, pipe.text_encoder

    ids = tokenizer("red heart", padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    other = tokenizer.encode("blue")[1]
    table = text_encoder.get_input_embeddings()
    vectors = table(ids)
    whole = text_encoder(ids)
    unchanged = run(text_encoder, vectors)

    mixed = vectors.clone()
    mixed[0, 1] = 0.5 * vectors[0, 1] + 0.5 * table.weight[other]
    context = run(text_encoder, mixed)
    picture = pipe(prompt_embeds=context, num_inference_steps=5, generator=torch.Generator().manual_seed(4)).images[0]

    # The same without taking the encoder apart: write the mixture into the table, or catch it on its way out.
    kept = table.weight[ids[0, 1]].clone()
    table.weight[ids[0, 1]] = mixed[0, 1]
    rewritten = text_encoder(ids).last_hidden_state
    table.weight[ids[0, 1]] = kept
    hook = table.register_forward_hook(lambda module, args, output: mixed)
    hooked = text_encoder(ids)[0]
    hook.remove()
    embedded = body(text_encoder).embeddings(input_ids=ids)
    return {
        "ids": ids,
        "tokens": torch.tensor(bytearray(tokenizer.decode(ids[0]).encode())),
        "whole": whole.last_hidden_state,
        "pooled": whole.pooler_output,
        "unchanged": unchanged,
        "same": torch.tensor(torch.equal(unchanged, whole[0])),
        "mixed": context,
        "rewritten": rewritten,
        "hooked": hooked,
        "embedded": embedded,
        "restored": text_encoder(ids)[0],
        "picture": picture,
    }
