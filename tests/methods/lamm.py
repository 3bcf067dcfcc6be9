import torch
from reference_method import SKETCHED, Option, Reference, encode_embedded_text, equals, full_ids
from small_clip import tokenizer


def features(method, model, images, config):
    ids, embedded = full_ids(config.clip.template), []
    for row, subwords in zip(ids, method.embeddings):
        name_start = 1 + len(tokenizer().encode("a photo of a"))
        words = model.token_embedding(row)
        embedded.append(torch.cat([words[:name_start], subwords, words[name_start + len(subwords) :]]))
    return model.encode_image(images), encode_embedded_text(model, ids, embedded)


def added_loss(method, options, x, frozen_x, z, frozen_z, logits, frozen_logits):
    distance = sum((new - old).square().sum() for new, old in zip(method.embeddings, method.initial_embeddings))
    p, q = logits / 2, frozen_logits / 2
    divergence = (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1).mean()
    return (
        options.text_weight * (1 - (z * frozen_z).sum(1)).mean()
        + options.embedding_weight * distance
        + options.logits_weight * 4 * divergence
    )


REFERENCE = Reference(
    features=features,
    added_loss=added_loss,
    starts=lambda towers, model: {
        "embeddings": equals(torch.stack([model.token_embedding(row)[6:7] for row in full_ids(SKETCHED)]))
    },
    options={"embedding_weight": Option(2.5), "text_weight": Option(3.5), "logits_weight": Option(0.4)},
    num_parameters=(({}, 5 * 512),),  # one subword per name
    random_start=False,
    needs_small_learning_rate=True,
)
