"""Changes of keys beside the workload, until the power goes: rekey, rewrap to another keyring, recipients that come and go."""

import os
import random
import subprocess
import threading


class KeyChanger(threading.Thread):
    """Runs one command after the other on a mounted volume. `failures` are commands that ended with an error before `stop`."""

    def __init__(self, stack, seed):
        super().__init__(daemon=True)
        self.stack, self.rng = stack, random.Random(seed)
        self.child, self.stopped, self.lock = None, False, threading.Lock()
        self.failures, self.done = [], 0

    def next_command(self):
        cipher, keys = self.stack.cipher, self.stack.recipients()
        what = self.rng.choice(("rekey", "rekey", "rekey", "rewrap", "rewrap", "add", "remove"))
        if what == "rewrap":
            return ["rewrap", cipher, "--from", self.rng.choice(keys), "--to", self.stack.fresh_key()] if keys else ["rewrap", cipher]
        if what == "add" and len(keys) < 3:
            return ["recipients", "add", cipher, self.stack.fresh_key()]
        if what == "remove" and len(keys) > 1:
            return ["recipients", "remove", cipher, self.rng.choice(keys)]
        return ["rekey", cipher]

    def run(self):
        while not self.stopped:
            command = [str(word) for word in (self.stack.program, *self.next_command())]
            with self.lock:
                if self.stopped:
                    return
                self.child = subprocess.Popen(
                    command, env=self.stack.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            said = self.child.communicate()[1]
            self.done += 1
            if self.child.returncode and not self.stopped:
                self.failures.append((" ".join(os.path.basename(word) for word in command[1:]), self.child.returncode, said[-300:]))

    def stop(self):
        """Ends the command that runs, as a power cut does."""
        with self.lock:
            self.stopped = True
            if self.child is not None:
                self.child.kill()
        self.join(60)
