//! The scenes, in order. Each does something to the volume, looks at what came of it, and tells that.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cli::commands::estimate::Cost;
use crate::cli::error::CliError;
use crate::cli::key_spec::KeySpec;
use crate::format::anatomy;
use crate::format::geometry::{PAGE_LEN, PAGE_SIZE, PAYLOAD_LEN, PageIndex};
use crate::format::header::{SLOT_LEN, parse_page};
use crate::format::hex;
use crate::format::name::VOLUME_DIR;
use crate::format::page::part;
use crate::keys::ProviderKind;

use super::look::{Changed, amiss, fingerprint, first, header_of, read_page, wait};
use super::provider::Call;
use super::stage::{Live, Stage};
use super::teller::{Scene, Teller};

/// How old a key may get here; a mount's usual limit is five minutes.
const MAX_AGE: Duration = Duration::from_secs(2);
/// How long a busy machine may take to see it, and to come back.
const PATIENCE: Duration = Duration::from_secs(32);
const TEXT: &str = "The treasure is under the old oak. ";
/// Pages of the file that is looked at.
const PAGES: usize = 3;
/// Wrapping the volume key and making its header, by `kmsfs init`.
const CALLS_OF_INIT: u64 = 1;

/// The demonstration.
pub(super) struct Show<'a> {
    stage: &'a Stage,
    teller: Teller,
    key: Option<&'a KeySpec>,
    rewrap_to: Option<&'a KeySpec>,
    content: Vec<u8>,
    /// Calls of the provider that are not the mount's.
    other_calls: BTreeMap<String, u64>,
}

impl<'a> Show<'a> {
    pub(super) fn new(
        stage: &'a Stage,
        teller: Teller,
        key: Option<&'a KeySpec>,
        rewrap_to: Option<&'a KeySpec>,
    ) -> Self {
        let content = TEXT.bytes().cycle().take(PAGES * PAYLOAD_LEN).collect();
        Self { stage, teller, key, rewrap_to, content, other_calls: BTreeMap::new() }
    }

    pub(super) fn run(mut self) -> Result<(), CliError> {
        self.volume()?;
        let live = self.stage.mount(MAX_AGE)?;
        let file = self.data_key(&live)?;
        self.header(&file)?;
        self.same_text_twice(&live, &file)?;
        self.flipped_bit(&live, &file)?;
        self.moved_page(&live, &file)?;
        self.disabled_key(&live)?;
        let calls = live.provider.calls();
        live.unmount()?;
        self.rewrap(&file)?;
        self.bill(&calls)
    }

    fn volume(&mut self) -> Result<(), CliError> {
        let cipher = self.stage.cipher();
        let key = self.key.map_or_else(|| self.keyring("first.toml"), KeySpec::to_string);
        self.stage.kmsfs(&[OsStr::new("init"), cipher.as_os_str(), OsStr::new("--key"), OsStr::new(&key)])?;
        self.other_calls.insert("GenerateDataKey".to_owned(), CALLS_OF_INIT);
        let local = self.key.is_none_or(|key| key.kind == ProviderKind::Local);
        let whose = if local {
            "The wrapping key is in a local keyring, which takes the place of a KMS: whoever has that file has the key."
        } else {
            "The wrapping key is in AWS KMS and never leaves it. It is used here, and not changed."
        };
        self.teller.tell(
            Scene::new("volume", "A volume, and a key that wraps keys")
                .say(whose)
                .fact("wrapping_key", "wrapping key", key)
                .fact("provider_calls", "calls so far", CALLS_OF_INIT)
                .say(
                    "One call made the volume key, which encrypts names and authenticates headers. Now it is mounted.",
                ),
        )
    }

    fn keyring(&self, name: &str) -> String {
        format!("{}:{}", ProviderKind::Local, self.stage.path(name).display())
    }

    fn data_key(&mut self, live: &Live) -> Result<PathBuf, CliError> {
        let file = self.write("secret.txt")?;
        let header = header_of(&file)?;
        let id = hex::encode_uuid(&header.data_key_id);
        let is_ours = |call: &&Call| call.context.iter().any(|(_, value)| *value == id);
        let calls = live.provider.calls();
        let born = calls.iter().find(is_ours).and_then(|call| Some((call, call.wrapped.clone()?)));
        let (call, wrapped) = born.ok_or_else(|| amiss("no call made the data key of a new file"))?;
        let context: Vec<String> = call.context.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let shown = format!("{} bytes: {}...", wrapped.bytes.len(), hex::encode(first(&wrapped.bytes, 12)));
        let scene = Scene::new("data_key", "A data key is born")
            .say(format!("A file of {} bytes is written to the mount. The provider is asked once:", self.content.len()))
            .fact("operation", "call", call.operation)
            .fact("key_id", "wrapping key", wrapped.key_id.clone())
            .fact("context", "bound to", context.join(", "))
            .say("It returned the new key twice: in plain, for memory only, and wrapped, for the disk.")
            .say("  plain              32 bytes in protected memory; never on disk, never shown")
            .shown("wrapped_key", "wrapped", hex::encode(&wrapped.bytes), shown)
            .shown("fingerprint", "fingerprint", hex::encode(&header.commitment), fingerprint(&header));
        self.teller.tell(scene.say("Only the wrapped key and the fingerprint are kept, in the file's header."))?;
        Ok(file)
    }

    fn header(&mut self, file: &Path) -> Result<(), CliError> {
        let page = read_page(file, 0)?;
        let slots = parse_page(&page);
        let (at, slot) = slots
            .iter()
            .enumerate()
            .find_map(|(at, slot)| Some((at, slot.as_ref().ok()?)))
            .ok_or_else(|| amiss("the new file has no header"))?;
        let mut fields = anatomy::of_slot(&slot.header);
        fields.retain(|field| field.name != "padding");
        let end = fields.last().map_or(0, |field| field.range.end);
        let bytes = &page[at * SLOT_LEN..][..end];
        self.teller.tell(
            Scene::new("header", "The header: what lies on the disk")
                .say("Everything that is needed to read the file, but the wrapping key:")
                .bytes("fields", bytes, &fields),
        )
    }

    fn same_text_twice(&mut self, live: &Live, file: &Path) -> Result<(), CliError> {
        let before = read_page(file, 1)?;
        let twin = read_page(&self.write("twin.txt")?, 1)?;
        let plain = File::options().write(true).open(self.stage.plain("secret.txt"));
        let written = plain.and_then(|plain| plain.write_all_at(&self.content, 0).and_then(|()| plain.sync_all()));
        written.map_err(|error| CliError::io("writing the same content again", &error))?;
        let again = read_page(file, 1)?;
        let equal = |other: &[u8; PAGE_LEN]| {
            let pairs = before[part::CIPHERTEXT].iter().zip(&other[part::CIPHERTEXT]);
            pairs.filter(|(one, other)| one == other).count()
        };
        let (in_twin, in_again) = (equal(&twin), equal(&again));
        // One byte in 256 is equal by chance: 16 of 4048.
        if in_twin.max(in_again) > 100 {
            return Err(amiss("equal content has equal ciphertext"));
        }
        self.check_read(live)?;
        let sample = |page: &[u8; PAGE_LEN]| hex::encode(first(&page[part::CIPHERTEXT], 24));
        let bytes = part::CIPHERTEXT.len();
        self.teller.tell(
            Scene::new("same_text_twice", "The same text, and never the same ciphertext")
                .fact("first", "first file", sample(&before))
                .fact("twin", "another file", sample(&twin))
                .fact("again", "written again", sample(&again))
                .shown("equal_bytes_in_twin", "equal bytes", in_twin, format!("{in_twin} of {bytes} in the other file"))
                .shown("equal_bytes_again", "", in_again, format!("{in_again} of {bytes} after writing again"))
                .say(format!(
                    "Chance alone makes {} equal: each file has its own key, each write a new nonce.",
                    bytes / 256
                )),
        )
    }

    fn flipped_bit(&mut self, live: &Live, file: &Path) -> Result<(), CliError> {
        let offset = PageIndex(1).disk().0 + 1000;
        let flip = || -> io::Result<()> {
            let disk = File::options().read(true).write(true).open(file)?;
            let mut byte = [0];
            disk.read_exact_at(&mut byte, offset)?;
            disk.write_all_at(&[byte[0] ^ 1], offset)
        };
        flip().map_err(|error| CliError::io(file.display(), &error))?;
        let refusal = self.refusal(live, "a page with a flipped bit is believed")?;
        flip().map_err(|error| CliError::io(file.display(), &error))?;
        self.check_read(live)?;
        self.teller.tell(
            Scene::new("flipped_bit", "One bit is flipped on the disk")
                .shown(
                    "offset",
                    "where",
                    offset,
                    format!("the lowest bit of byte {offset} of the ciphertext, in page 1"),
                )
                .fact("read", "reading", refusal)
                .say("Wrong bytes are never returned. The bit is flipped back, and all of it reads again."),
        )
    }

    fn moved_page(&mut self, live: &Live, file: &Path) -> Result<(), CliError> {
        let swap = || -> Result<(), CliError> {
            let (one, two) = (read_page(file, 1)?, read_page(file, 2)?);
            let disk = File::options().write(true).open(file);
            let written = disk.and_then(|disk| {
                disk.write_all_at(&one, 2 * PAGE_SIZE).and_then(|()| disk.write_all_at(&two, PAGE_SIZE))
            });
            written.map_err(|error| CliError::io(file.display(), &error))
        };
        swap()?;
        let refusal = self.refusal(live, "a page at another place is believed")?;
        swap()?;
        self.check_read(live)?;
        self.teller.tell(
            Scene::new("moved_page", "Two whole pages change places")
                .say("Pages 0 and 1 are exchanged on the disk. Both are authentic, under the right key:")
                .fact("read", "reading", refusal)
                .say("A page is sealed together with its place in the file. They are put back, and all of it reads again."),
        )
    }

    fn disabled_key(&mut self, live: &Live) -> Result<(), CliError> {
        let open =
            File::open(self.stage.plain("secret.txt")).map_err(|error| CliError::io("opening the file", &error))?;
        self.check_read(live)?;
        live.provider.disable(true);
        let start = Instant::now();
        let mut byte = [0];
        let refusal =
            wait(PATIENCE, || open.read_exact_at(&mut byte, 0).err()).ok_or_else(|| amiss("a disabled key goes on"))?;
        let dark = start.elapsed();
        live.provider.disable(false);
        let start = Instant::now();
        wait(PATIENCE, || fs::read(self.stage.plain("secret.txt")).ok().filter(|read| *read == self.content))
            .ok_or_else(|| amiss("the file does not come back"))?;
        let back = start.elapsed();
        drop(open);
        let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
        self.teller.tell(
            Scene::new("disabled_key", "The key is disabled, and the mount goes dark")
                .say("A program has the file open. From now on the provider answers as it does for a disabled key.")
                .shown("max_age_seconds", "limit", MAX_AGE.as_secs(), format!("{} (--key-max-age)", seconds(MAX_AGE)))
                .shown("dark_after_seconds", "dark after", dark.as_secs_f64(), seconds(dark))
                .fact("read", "reading", refusal.to_string())
                .shown("back_after_seconds", "back after", back.as_secs_f64(), seconds(back))
                .say("Then the key is enabled again, and the file reads: nothing was unmounted, and nothing lost."),
        )
    }

    fn rewrap(&mut self, file: &Path) -> Result<(), CliError> {
        let before = self.ciphertext()?;
        let old = header_of(file)?;
        let to = self.rewrap_to.map_or_else(|| self.keyring("second.toml"), KeySpec::to_string);
        let cipher = self.stage.cipher();
        let arguments = ["rewrap", "--json", "--to", &to].map(OsStr::new);
        let report = self.stage.kmsfs(&[&arguments[..], &[cipher.as_os_str()]].concat())?;
        let report: serde_json::Value = serde_json::from_str(&report).unwrap_or_default();
        for (operation, name) in [("ReEncrypt", "re_encrypt"), ("Decrypt", "decrypt"), ("Encrypt", "encrypt")] {
            *self.other_calls.entry(operation.to_owned()).or_default() += report[name].as_u64().unwrap_or(0);
        }
        let after = self.ciphertext()?;
        let changed = Changed::between(&before, &after);
        if changed.in_pages > 0 || changed.in_headers == 0 || header_of(file)?.records == old.records {
            return Err(amiss("rewrapping changed something else than headers"));
        }
        let live = self.stage.mount(MAX_AGE)?;
        self.check_read(&live)?;
        live.unmount()?;
        self.teller.tell(
            Scene::new("rewrap", "Moving to another wrapping key, without touching data")
                .fact("to", "new key", to)
                .fact("files", "files moved", report["files_changed"].as_u64().unwrap_or(0))
                .fact("bytes", "bytes in all", changed.bytes)
                .fact("changed_in_headers", "changed in headers", changed.in_headers)
                .fact("changed_in_pages", "changed in pages", changed.in_pages)
                .shown(
                    "fingerprint",
                    "fingerprint",
                    hex::encode(&old.commitment),
                    format!("{}, as before", fingerprint(&old)),
                )
                .say("The data key is the same, under another wrapping key. The old one opens nothing here any more."),
        )
    }

    fn bill(mut self, calls: &[Call]) -> Result<(), CliError> {
        let mut counts = std::mem::take(&mut self.other_calls);
        for call in calls {
            *counts.entry(call.operation.to_owned()).or_default() += 1;
        }
        counts.retain(|_, count| *count > 0);
        let total: u64 = counts.values().sum();
        let dollars = Cost::of(total, 1).dollars;
        let local = self.key.is_none_or(|key| key.kind == ProviderKind::Local);
        let whose = if local { "if it were AWS KMS" } else { "at AWS KMS" };
        let shown = counts.iter().map(|(operation, count)| format!("{count} {operation}")).collect::<Vec<_>>();
        self.teller.tell(
            Scene::new("calls", "What it took")
                .shown("calls_by_operation", "calls", &counts, shown.join(", "))
                .fact("calls", "in all", total)
                .shown("dollars", "cost", dollars, format!("{dollars:.4} dollars {whose}"))
                .say("Reading and writing pages asks nobody: keys are asked for when files are made and opened, and when they get old."),
        )
    }

    /// Writes the content to a new file of the mount; returns the ciphertext file that came of it.
    fn write(&self, name: &str) -> Result<PathBuf, CliError> {
        let failed = |error: io::Error| CliError::io(format_args!("writing {name} to the mount"), &error);
        let before: BTreeSet<_> = self.ciphertext()?.into_keys().collect();
        let mut file = OpenOptions::new().write(true).create_new(true).open(self.stage.plain(name)).map_err(failed)?;
        file.write_all(&self.content).and_then(|()| file.sync_all()).map_err(failed)?;
        let new = self.ciphertext()?.into_keys().find(|path| !before.contains(path));
        new.ok_or_else(|| amiss("a new file has no ciphertext"))
    }

    /// The files of the cipher directory with their content.
    fn ciphertext(&self) -> Result<BTreeMap<PathBuf, Vec<u8>>, CliError> {
        let cipher = self.stage.cipher();
        let failed = |error: io::Error| CliError::io(cipher.display(), &error);
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&cipher).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name() != VOLUME_DIR && entry.file_type().map_err(failed)?.is_file() {
                files.insert(entry.path(), fs::read(entry.path()).map_err(failed)?);
            }
        }
        Ok(files)
    }

    /// What reading answers now that the ciphertext is damaged.
    fn refusal(&self, live: &Live, amiss_if_read: &'static str) -> Result<String, CliError> {
        match self.read_anew(live) {
            Ok(_) => Err(amiss(amiss_if_read)),
            Err(error) => Ok(error.to_string()),
        }
    }

    fn check_read(&self, live: &Live) -> Result<(), CliError> {
        let read = self.read_anew(live).map_err(|error| CliError::io("reading the file", &error))?;
        if read == self.content { Ok(()) } else { Err(amiss("other bytes were read than were written")) }
    }

    /// Reads the file from the disk: the kernel has nothing of it afterwards, and neither has the mount.
    fn read_anew(&self, live: &Live) -> io::Result<Vec<u8>> {
        live.filesystem.lock();
        live.filesystem.unlock();
        fs::read(self.stage.plain("secret.txt"))
    }
}
