//! The protocol of changing keys under a mount, as small as it can be: two files, two wrapping keys, all orders of its steps, and
//! after each of them a crash. `docs/FORMAT.md` section 6.8, `docs/OPERATIONS.md` section 9.

use std::collections::HashSet;

/// What is left out, to see that it is needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Without {
    Nothing,
    /// A header is written only over the one that it was made from.
    JudgedHeader,
    /// Who changes keys waits for a file that is being sealed anew.
    OneAtATime,
    /// Nobody writes a file that is being sealed anew.
    OneOwner,
    /// A log whose header the file has is not applied.
    Generation,
    /// The header of a log is written after its pages.
    HeaderLast,
}

/// Names a data key, the one that its records hold, the wrapping keys of those, and its age.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Header {
    data_key: u8,
    wrapped: u8,
    keys: u8,
    generation: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct File {
    id: u8,
    header: Header,
    /// Under which data key its page is sealed, and what it holds.
    page: (u8, u8),
    synced: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Log {
    id: u8,
    header: Header,
    content: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Sealing {
    Sealed,
    Counts,
    /// The first of header and pages is written.
    Half,
    Applied,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Rewrap {
    No,
    Listed,
    /// The header of the file at this name was read.
    Judged(usize, Header),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    /// By name.
    files: [File; 2],
    list: u8,
    sealing: Option<(Log, Sealing)>,
    log: Option<Log>,
    rewrap: Rewrap,
    /// The next id, data key and content; each is used once.
    next: u8,
}

const OLD: u8 = 1;
const NEW: u8 = 2;
/// Things that are made, in all; so the states are finitely many.
const MADE: u8 = 6;

fn start() -> State {
    let file = |n: u8| File {
        id: n,
        header: Header { data_key: n, wrapped: n, keys: OLD, generation: 1 },
        page: (n, n),
        synced: n,
    };
    State { files: [file(0), file(1)], list: OLD, sealing: None, log: None, rewrap: Rewrap::No, next: 2 }
}

impl State {
    fn make(&mut self) -> u8 {
        self.next += 1;
        self.next - 1
    }

    fn of(&mut self, id: u8) -> Option<&mut File> {
        self.files.iter_mut().find(|file| file.id == id)
    }

    fn is_sealing(&self, id: u8) -> bool {
        self.sealing.is_some_and(|(log, _)| log.id == id)
    }

    /// What the next mount makes of it.
    fn after_a_crash(&self, without: Without) -> Self {
        let mut state = self.clone();
        state.sealing = None;
        if let Some(log) = state.log.take()
            && let Some(file) = state.of(log.id)
        {
            let follows = file.header.generation + 1 == log.header.generation;
            let had = without == Without::Generation && file.header.generation == log.header.generation;
            if follows || had {
                (file.header, file.page) = (log.header, (log.header.data_key, log.content));
            }
        }
        state
    }

    fn is_sound(&self, without: Without) -> bool {
        let whole = |state: &Self| {
            state.files.iter().all(|file| {
                let opens = file.header.wrapped == file.header.data_key && file.header.keys & state.list != 0;
                opens && file.page == (file.header.data_key, file.synced)
            })
        };
        let at_rest = self.sealing.is_some() || self.log.is_some() || whole(self);
        at_rest && whole(&self.after_a_crash(without))
    }

    /// All states that follow by one step of a program, of a client, of the mount, or by a crash.
    fn next(&self, without: Without) -> Vec<Self> {
        let mut all = Vec::new();
        let mut step = |change: &dyn Fn(&mut Self) -> bool| {
            let mut state = self.clone();
            if change(&mut state) && state != *self && state.next <= MADE {
                all.push(state);
            }
        };
        for n in 0..2 {
            let is_free = !self.is_sealing(self.files[n].id) || without == Without::OneOwner;
            step(&|state| {
                let (content, file) = (state.make(), &mut state.files[n]);
                (file.page, file.synced) = ((file.header.data_key, content), content);
                is_free
            });
            step(&|state| {
                let made = state.make();
                let header = Header { data_key: made, wrapped: made, keys: state.list, generation: 1 };
                state.files[n] = File { id: made, header, page: (made, made), synced: made };
                true
            });
            step(&|state| {
                let (made, file) = (state.make(), state.files[n]);
                let header =
                    Header { data_key: made, wrapped: made, keys: state.list, generation: file.header.generation + 1 };
                state.sealing = Some((Log { id: file.id, header, content: file.page.1 }, Sealing::Sealed));
                let steady = self.rewrap == Rewrap::No || without == Without::OneAtATime;
                self.sealing.is_none() && self.log.is_none() && steady
            });
            step(&|state| {
                state.rewrap = Rewrap::Judged(n, state.files[n].header);
                self.rewrap == Rewrap::Listed && self.files[n].header.keys != NEW
            });
        }
        step(&|state| {
            state.files.swap(0, 1);
            true
        });
        step(&|state| state.go_on_sealing(without));
        step(&|state| {
            (state.rewrap, state.list) = (Rewrap::Listed, OLD | NEW);
            let steady = (self.sealing.is_none() && self.log.is_none()) || without == Without::OneAtATime;
            self.rewrap == Rewrap::No && self.list != NEW && steady
        });
        step(&|state| state.write_header(without));
        step(&|state| {
            (state.rewrap, state.list) = (Rewrap::No, NEW);
            let none_needs_it = state.files.iter().all(|file| file.header.keys & NEW != 0);
            let no_log = self.log.is_none() || without == Without::OneAtATime;
            self.rewrap == Rewrap::Listed && none_needs_it && no_log
        });
        // The client goes away, and the machine does.
        step(&|state| {
            state.rewrap = Rewrap::No;
            true
        });
        step(&|state| {
            *state = self.after_a_crash(without);
            true
        });
        all
    }

    fn go_on_sealing(&mut self, without: Without) -> bool {
        let Some((log, at)) = self.sealing else { return false };
        let header_first = without == Without::HeaderLast;
        let next = match at {
            Sealing::Sealed => {
                self.log = Some(log);
                Sealing::Counts
            }
            Sealing::Counts | Sealing::Half => {
                let writes_header = (at == Sealing::Counts) == header_first;
                if let Some(file) = self.of(log.id) {
                    match writes_header {
                        true => file.header = log.header,
                        false => file.page = (log.header.data_key, log.content),
                    }
                }
                if at == Sealing::Counts { Sealing::Half } else { Sealing::Applied }
            }
            Sealing::Applied => {
                self.log = None;
                self.sealing = None;
                return true;
            }
        };
        self.sealing = Some((log, next));
        true
    }

    fn write_header(&mut self, without: Without) -> bool {
        let Rewrap::Judged(n, judged) = self.rewrap else { return false };
        self.rewrap = Rewrap::Listed;
        let header = self.files[n].header;
        let is_free = !self.is_sealing(self.files[n].id);
        if header == judged || without == Without::JudgedHeader {
            let generation = header.generation + 1;
            self.files[n].header = Header { wrapped: judged.wrapped, keys: NEW, generation, ..header };
        }
        is_free || matches!(without, Without::OneOwner | Without::OneAtATime)
    }

    /// The log that could not be removed is there after the file is in use again.
    fn with_log_left(&self) -> Option<Self> {
        let (_, Sealing::Applied) = self.sealing? else { return None };
        Some(Self { sealing: None, ..self.clone() })
    }
}

/// The first unsound state that can be reached, if there is one, and how many were looked at.
fn explore(without: Without) -> (Option<State>, usize) {
    let (mut seen, mut waiting) = (HashSet::from([start()]), vec![start()]);
    while let Some(state) = waiting.pop() {
        if !state.is_sound(without) {
            return (Some(state), seen.len());
        }
        for next in state.next(without).into_iter().chain(state.with_log_left()) {
            if seen.insert(next.clone()) {
                waiting.push(next);
            }
        }
    }
    (None, seen.len())
}

#[test]
fn no_order_of_steps_and_no_crash_loses_a_file_or_what_it_holds() {
    let (unsound, states) = explore(Without::Nothing);
    assert_eq!(unsound, None);
    assert!(states > 10_000, "{states}");
}

#[test]
fn each_guard_is_needed() {
    use Without::{Generation, HeaderLast, JudgedHeader, OneAtATime, OneOwner};
    for without in [JudgedHeader, OneAtATime, OneOwner, Generation, HeaderLast] {
        assert!(explore(without).0.is_some(), "{without:?}");
    }
}
