import torch

from lightning_ft.functional.calibration import calibrate


def test_hand_worked() -> None:
    calibrated = calibrate(torch.tensor([[0.6, 0.4], [0.7, 0.3]]), torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(calibrated, torch.tensor([[0.39130, 0.60870], [0.5, 0.5]]), atol=1e-5, rtol=0)


def test_no_preference_changes_nothing() -> None:
    given = torch.tensor([[0.2, 0.5, 0.3]])
    torch.testing.assert_close(calibrate(given, torch.full((3,), 1 / 3)), given)


def test_labels_that_never_come_are_clamped() -> None:
    given = torch.tensor([[1.0, 0.0], [1 - 1e-6, 1e-6]])
    calibrated = calibrate(given, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(calibrated, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
