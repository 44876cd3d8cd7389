//! The volume's own directory: the config and its previous state, provisioned keys, and what crashes left.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::format::config::{BROKEN_CONFIG_FILE, CONFIG_COPY_FILE, CONFIG_FILE};
use crate::format::name::{
    LEASE_FILE, LOCK_FILE, LONG_TARGETS_DIR, LongTarget, PROVISIONED_DIR, REDO_LOGS_DIR, REKEYED, RedoLog, VOLUME_DIR,
    is_provisioned,
};
use crate::format::provisioned;
use crate::storage::{KeyStock, Node};

use super::Checker;
use super::finding::{Found, Kind, Mend, Place, Severity};
use super::places::each_entry;

/// A new file that is older than this was left by a crash.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

impl Checker<'_> {
    /// Checks everything in `.kmsfs` but what the config says.
    pub(super) fn check_volume_files(&self) {
        let place = Place { cipher: VOLUME_DIR.to_owned(), plain: None };
        let mut found = Found::default();
        if let Err(error) = self.look_at_volume_files(&place, &mut found) {
            found.io(&place, &error);
        }
        // What is found here is old, or in nobody's way: it is believed at once.
        self.counts.findings.fetch_add(found.0.len() as u64, std::sync::atomic::Ordering::Relaxed);
        super::locked(&self.found).extend(found.0);
    }

    fn look_at_volume_files(&self, place: &Place, found: &mut Found) -> io::Result<()> {
        let node = self.root.lookup(VOLUME_DIR)?;
        for entry in names(&node)? {
            let known = [CONFIG_FILE, CONFIG_COPY_FILE, LEASE_FILE, LOCK_FILE].contains(&entry.as_str());
            if known || entry.starts_with(BROKEN_CONFIG_FILE) {
                continue;
            }
            if entry == PROVISIONED_DIR {
                self.look_at_stock(&node.lookup(&entry)?, &place.entry(&entry, None), found)?;
            } else if entry == LONG_TARGETS_DIR {
                let (links, place) = (node.lookup(&entry)?, place.entry(&entry, None));
                // One that no symlink names is harmless: a crash leaves such.
                let strange = names(&links)?.into_iter().filter(|name| !LongTarget::is_file(name));
                strange.for_each(|name| other(&links, &name, &place, found));
            } else if entry == REDO_LOGS_DIR {
                self.look_at_redo_logs(&node.lookup(&entry)?, &place.entry(&entry, None), found)?;
            } else {
                other(&node, &entry, place, found);
            }
        }
        Ok(())
    }

    fn look_at_redo_logs(&self, node: &Node, place: &Place, found: &mut Found) -> io::Result<()> {
        for entry in names(node)? {
            // The logs themselves are looked at when the files have been.
            if RedoLog::parse(&entry).is_none() && entry != REKEYED {
                other(node, &entry, place, found);
            }
        }
        Ok(())
    }

    fn look_at_stock(&self, node: &Node, place: &Place, found: &mut Found) -> io::Result<()> {
        let stock = self.directory.key_stock()?;
        for entry in names(node)? {
            if is_provisioned(&entry) {
                self.look_at_provisioned(&stock, &entry, &place.entry(&entry, None), found);
            } else {
                other(node, &entry, place, found);
            }
        }
        Ok(())
    }

    fn look_at_provisioned(&self, stock: &KeyStock, entry: &str, place: &Place, found: &mut Found) {
        // A mount may have taken it meanwhile.
        let Some(bytes) = stock.read(entry) else { return };
        let good = match self.volume {
            Some(volume) => volume.ring.is_provisioned(entry, &bytes),
            None => provisioned::parse(&bytes).is_some_and(|parsed| parsed.content.volume_id == self.volume_id),
        };
        if !good {
            let what = "the provisioned key is not one of this volume's, or was changed: mounts leave it where it is";
            found.add(place, Severity::Amiss, Kind::ProvisionedKey, what);
        }
    }
}

/// An entry that no reader looks at.
fn other(node: &Node, entry: &str, above: &Place, found: &mut Found) {
    let place = above.entry(entry, None);
    if !entry.ends_with(".new") {
        return found.add(
            &place,
            Severity::Amiss,
            Kind::Stray,
            "no writer of a volume makes this: something else put it here",
        );
    }
    let Ok(stat) = node.lookup(entry).and_then(|node| node.stat()) else { return };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let changed = u64::try_from(stat.mtime.seconds).unwrap_or(0);
    if now.saturating_sub(changed) > LEFT_BEHIND.as_secs() {
        found.add_mendable(
            &place,
            Kind::Leftover,
            Mend::Remove,
            "a new file that was never put in its place: a crash left it",
        );
    }
}

fn names(node: &Node) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    each_entry(node, |entry, _| {
        if entry != "." && entry != ".." {
            names.push(entry.to_owned());
        }
    })?;
    Ok(names)
}
