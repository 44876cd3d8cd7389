//! The walk through a cipher directory with many threads, and the second and third look at what a writer beside it may have
//! caused.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::format::name::{self, Entry};
use crate::storage::{NodeKind, Timestamp};

use super::entries::Looked;
use super::files::Large;
use super::finding::{Finding, Found, Place, Severity};
use super::places::{Dir, each_entry};
use super::targets::{Target, TargetError};
use super::{Checker, count, locked};
use crate::runtime::WorkQueue;

/// What has not changed for so long is not being changed now.
const AT_REST: Duration = Duration::from_secs(30);
/// The waits before the second and the third look: a writer is not interrupted in one step for so long.
const LOOK_AGAIN: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];

/// Findings that may be a writer's work under way.
pub(super) struct Suspect {
    cipher: String,
    findings: Vec<Finding>,
}

enum Task {
    Entry(Arc<Dir>, String, Option<NodeKind>),
    Piece(Arc<Large>, Range<u64>),
}

impl Checker<'_> {
    /// Checks what the targets name, and everything below it; returns the findings, sorted by place.
    ///
    /// # Errors
    /// [`TargetError`] if a target is not there.
    pub fn run(&self, targets: &[Target]) -> Result<Vec<Finding>, TargetError> {
        let queue = WorkQueue::new(Vec::new());
        let root = Place { cipher: String::new(), plain: Some(Vec::new()) };
        let mut found = Found::default();
        let root = Arc::new(self.directory(self.root.clone(), root, &mut found));
        if let (Some(volume), Some(id)) = (self.volume, root.id) {
            super::xattrs::check(volume, &root.node, &id, &root.place, &mut found);
        }
        self.conclude("", found, None);
        if targets.iter().any(Target::is_whole) {
            self.whole.store(true, Ordering::Relaxed);
            count(&self.counts.directories);
            self.check_volume_files();
            self.list(&root, &queue);
        } else {
            for target in targets {
                let (dir, entry) = self.find(&root, target)?;
                queue.push(Task::Entry(dir, entry, Some(NodeKind::Directory)));
            }
        }
        queue.run(self.settings.parallel, |task| self.work(task, &queue));
        self.look_again();
        if self.whole.load(Ordering::Relaxed)
            && let Err(error) = self.check_redo_logs()
        {
            return Err(TargetError::Io(".kmsfs/rekey".to_owned(), error));
        }
        let mut findings = std::mem::take(&mut *locked(&self.found));
        findings.sort_by(|a, b| (&a.cipher, a.kind, a.page).cmp(&(&b.cipher, b.kind, b.page)));
        Ok(findings)
    }

    fn work(&self, task: Task, queue: &WorkQueue<Task>) {
        match task {
            Task::Entry(dir, entry, _) => {
                let Looked { found, changed, directory, pieces } = self.look(&dir, &entry, true);
                match pieces {
                    Some(pieces) => {
                        locked(&pieces.file.found).0.extend(found.0);
                        pieces.each().for_each(|range| self.leave(Task::Piece(Arc::clone(&pieces.file), range), queue));
                    }
                    None => self.conclude(&dir.place.entry(&entry, None).cipher, found, changed),
                }
                if let Some(directory) = directory {
                    self.list(&directory, queue);
                }
            }
            Task::Piece(file, range) => {
                let mut found = Found::default();
                self.open_range(&file.sealed, range, &file.place, &mut found);
                if file.finish(found) {
                    let found = std::mem::take(&mut *locked(&file.found));
                    self.note_unsettled(file.is_unsettled(), &file.place, &found);
                    self.note_unreachable(&file.place);
                    self.conclude(&file.place.cipher, found, None);
                }
            }
        }
    }

    /// Leaves a task to whoever is free. One that finds no others is done at once if there is enough to do.
    fn leave(&self, task: Task, queue: &WorkQueue<Task>) {
        match task {
            // A tree may be deeper than a stack.
            Task::Entry(_, _, None | Some(NodeKind::Directory)) => queue.push(task),
            task => {
                if let Some(task) = queue.offer(task) {
                    self.work(task, queue);
                }
            }
        }
    }

    fn list(&self, dir: &Arc<Dir>, queue: &WorkQueue<Task>) {
        let listed = each_entry(&dir.node, |entry, kind| {
            let ours = matches!(name::classify(entry), Entry::Ours);
            // The backing filesystem may not tell which of the others are directories.
            let kind = if ours && kind.is_none() { Some(NodeKind::Symlink) } else { kind };
            self.leave(Task::Entry(Arc::clone(dir), entry.to_owned(), kind), queue);
        });
        if let Err(error) = listed {
            let mut found = Found::default();
            found.io(&dir.place, &error);
            self.conclude(&dir.place.cipher, found, None);
        }
    }

    /// Believes what was found, or remembers to look again. What a provider answered is no writer's doing.
    pub(super) fn conclude(&self, cipher: &str, found: Found, changed: Option<Timestamp>) {
        if found.0.is_empty() {
            return;
        }
        self.counts.findings.fetch_add(found.0.len() as u64, Ordering::Relaxed);
        let at_once = self.settings.alone || changed.is_some_and(is_at_rest) || cipher.is_empty();
        let (believed, suspect): (Vec<_>, Vec<_>) =
            found.0.into_iter().partition(|finding| at_once || finding.severity == Severity::Key);
        locked(&self.found).extend(believed);
        if !suspect.is_empty() {
            locked(&self.suspects).push(Suspect { cipher: cipher.to_owned(), findings: suspect });
        }
    }

    /// Looks twice more at what may have been under way, after a pause; what is found each time is believed.
    fn look_again(&self) {
        for pause in LOOK_AGAIN {
            let suspects = std::mem::take(&mut *locked(&self.suspects));
            if suspects.is_empty() {
                return;
            }
            std::thread::sleep(pause);
            WorkQueue::new(suspects).run(self.settings.parallel, |suspect| {
                if let Some(suspect) = self.look_at_suspect(suspect) {
                    locked(&self.suspects).push(suspect);
                }
            });
        }
        let suspects = std::mem::take(&mut *locked(&self.suspects));
        locked(&self.found).extend(suspects.into_iter().flat_map(|suspect| suspect.findings));
    }

    /// What is still as it was found; nothing if the object is gone.
    fn look_at_suspect(&self, suspect: Suspect) -> Option<Suspect> {
        let (dir, entry) = self.find_cipher(&suspect.cipher).ok()?;
        let now = self.look(&dir, &entry, false).found.0;
        let still = |finding: &Finding| suspect.findings.iter().any(|before| before.is_same(finding));
        let findings: Vec<_> = now.into_iter().filter(still).collect();
        (!findings.is_empty()).then_some(Suspect { findings, ..suspect })
    }
}

fn is_at_rest(changed: Timestamp) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let changed = u64::try_from(changed.seconds).unwrap_or(0);
    now.checked_sub(changed).is_some_and(|age| age > AT_REST.as_secs())
}
