"""Meta-World's fifty tasks (version 3 of each), and how we say them; needs nothing that is not installed."""

from __future__ import annotations

INSTRUCTIONS = {
    "assembly-v3": "pick up the wrench-shaped nut and put its ring over the peg",
    "basketball-v3": "pick up the basketball and drop it through the hoop",
    "bin-picking-v3": "move the block from the red bin into the blue bin",
    "box-close-v3": "take the lid and put it on the box",
    "button-press-topdown-v3": "press the red button down from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the red button down from above",
    "button-press-v3": "push the red button in",
    "button-press-wall-v3": "reach around the wall and push the red button in",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine to the target",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "lift the nut off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door by turning its lock down",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door by turning its lock",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-close-v3": "close the faucet by turning its handle",
    "faucet-open-v3": "open the faucet by turning its handle",
    "hammer-v3": "take the hammer and drive the nail in",
    "hand-insert-v3": "put the gripper into the hole",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "take the peg and push it into the hole from the side",
    "peg-unplug-side-v3": "pull the peg out of its socket",
    "pick-out-of-hole-v3": "lift the puck out of the hole and bring it to the target",
    "pick-place-v3": "pick up the puck and bring it to the target",
    "pick-place-wall-v3": "pick up the puck and bring it over the wall to the target",
    "plate-slide-back-side-v3": "slide the plate sideways out of the cabinet",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-side-v3": "slide the plate sideways into the cabinet",
    "plate-slide-v3": "slide the plate into the cabinet",
    "push-back-v3": "pull the puck back to the target",
    "push-v3": "push the puck to the target",
    "push-wall-v3": "push the puck around the wall to the target",
    "reach-v3": "move the gripper to the target",
    "reach-wall-v3": "move the gripper over the wall to the target",
    "shelf-place-v3": "pick up the block and put it on the shelf",
    "soccer-v3": "push the ball into the goal",
    "stick-pull-v3": "take the stick and pull the thermos with it to the target",
    "stick-push-v3": "take the stick and push the thermos with it to the target",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table to the target",
    "window-close-v3": "slide the window shut",
    "window-open-v3": "slide the window open",
}
CAMERAS = ("main", "wrist")
ACTION = ("x", "y", "z", "gripper")
STATE = ("x", "y", "z", "gripper")
CONTROL_RATE = 80  # actions per second of simulated time: five steps of 2.5 ms each
EPISODE_STEPS = 500  # Meta-World's own limit
MEMORY = 600 * 2**20  # bytes; what a process with one environment takes, see benchmarks/environments.py
