//! `kmsfs top`: a mount, live. What is shown is in `top_view`; this is the asking and the terminal.

use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::cli::error::{CliError, Exit};
use crate::cli::span::Span;
use crate::cli::watched::Watched;
use crate::daemon::control::Ask;
use crate::daemon::signals;

use super::status;
use super::top_view::{self, Frame};

/// How long a mount may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest time without a look at whether it is over.
const LOOK: Duration = Duration::from_millis(500);
/// What a terminal has that does not say.
const USUAL_SIZE: (usize, usize) = (80, 24);
const CTRL_C: u8 = 3;

/// Watch a mount: throughput, latency of each operation, key cache, calls of the key's provider, errors. q quits
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// The mount point
    mountpoint: PathBuf,
    /// Look so often
    #[arg(long, short, value_name = "DURATION", default_value = "1s")]
    interval: Span,
    /// Show one interval and end
    #[arg(long)]
    once: bool,
    /// Print JSON, one line for each interval
    #[arg(long)]
    json: bool,
}

/// Shows it until it is enough.
pub(crate) fn run(args: &TopArgs) -> Result<(), CliError> {
    if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&args.interval.0) {
        return Err(CliError::usage("--interval must be from 0.1s to 1h"));
    }
    let mountpoint = status::canonical(&args.mountpoint)?;
    let over = Arc::new(AtomicBool::new(false));
    let for_signals = Arc::clone(&over);
    let watch = signals::on_end_request(move || for_signals.store(true, Ordering::Relaxed));
    let _watch = watch.map_err(|error| CliError::io("signals", &error))?;
    let mut before = ask(&mountpoint)?;
    let live = !args.once && !args.json && io::stdout().is_terminal();
    let screen = live.then(Screen::enter).transpose().map_err(|error| CliError::io("the terminal", &error))?;
    let shown = watch_until(args, &mountpoint, &over, screen.as_ref(), &mut before);
    // The terminal is as it was before an error is told.
    drop(screen);
    shown
}

fn watch_until(
    args: &TopArgs,
    mountpoint: &Path,
    over: &AtomicBool,
    screen: Option<&Screen>,
    before: &mut (Instant, Watched),
) -> Result<(), CliError> {
    if let Some(screen) = screen {
        screen.show(&["one moment".to_owned()]).map_err(|error| CliError::io("standard output", &error))?;
    }
    loop {
        let until = before.0 + args.interval.0;
        if wait(until, over, screen) {
            return Ok(());
        }
        let now = ask(mountpoint)?;
        let frame = Frame::between(&before.1, &now.1, now.0.duration_since(before.0));
        match put(args, screen, &frame) {
            // Who reads has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            put => put.map_err(|error| CliError::io("standard output", &error))?,
        }
        if args.once {
            return Ok(());
        }
        *before = now;
    }
}

fn put(args: &TopArgs, screen: Option<&Screen>, frame: &Frame) -> io::Result<()> {
    if let Some(screen) = screen {
        let (width, height) = Screen::size();
        return screen.show(&top_view::lines(frame, width, height));
    }
    if args.json {
        return write_out(&format!("{}\n", serde_json::to_string(frame)?));
    }
    let lines = top_view::lines(frame, USUAL_SIZE.0, usize::MAX).join("\n");
    write_out(&if args.once { format!("{lines}\n") } else { format!("{lines}\n\n") })
}

fn ask(mountpoint: &Path) -> Result<(Instant, Watched), CliError> {
    let told = status::connect(mountpoint)
        .and_then(|client| client.tell(Ask::Measures, DEADLINE))
        .map_err(|error| status::failure(mountpoint, &error))?;
    let watched = serde_json::from_str(&told).map_err(|_| {
        CliError::new(
            Exit::Other,
            format_args!("{}: the mount is served by another version of kmsfs", mountpoint.display()),
        )
        .hint("use the same version, or mount it again")
    })?;
    Ok((Instant::now(), watched))
}

/// Waits for the next look; returns whether it is over instead.
fn wait(until: Instant, over: &AtomicBool, screen: Option<&Screen>) -> bool {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if over.load(Ordering::Relaxed) || left.is_zero() {
            return over.load(Ordering::Relaxed);
        }
        match screen {
            Some(screen) if screen.reads_keys() => {
                if screen.is_quit_asked(left.min(LOOK)) {
                    return true;
                }
            }
            _ => thread::sleep(left.min(LOOK)),
        }
    }
}

/// The terminal while it shows frames; as it was before when dropped.
struct Screen {
    /// How keys were read before; none if standard input is no terminal.
    keys: Option<Termios>,
}

impl Screen {
    fn enter() -> io::Result<Self> {
        let keys = if io::stdin().is_terminal() { Some(tcgetattr(io::stdin())?) } else { None };
        // The other screen, without a cursor.
        write_out("\x1b[?1049h\x1b[?25l")?;
        Ok(Self { keys })
    }

    fn size() -> (usize, usize) {
        let size = tcgetwinsize(io::stdout()).ok().map(|size| (size.ws_col.into(), size.ws_row.into()));
        size.filter(|(width, height)| *width > 0 && *height > 0).unwrap_or(USUAL_SIZE)
    }

    fn show(&self, lines: &[String]) -> io::Result<()> {
        let text: Vec<_> = lines.iter().map(|line| format!("{line}\x1b[K")).collect();
        write_out(&format!("\x1b[H{}\x1b[J", text.join("\r\n")))
    }

    fn reads_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Whether a key that quits is pressed within this time, which is at most a second.
    fn is_quit_asked(&self, within: Duration) -> bool {
        let Some(before) = &self.keys else { return false };
        let mut raw = before.clone();
        raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
        raw.special_codes[SpecialCodeIndex::VMIN] = 0;
        raw.special_codes[SpecialCodeIndex::VTIME] = u8::try_from(within.as_millis() / 100).unwrap_or(10).max(1);
        if tcsetattr(io::stdin(), OptionalActions::Now, &raw).is_err() {
            return true;
        }
        let mut key = [0; 16];
        match io::stdin().read(&mut key) {
            Ok(len) => key[..len].iter().any(|key| [b'q', b'Q', CTRL_C].contains(key)),
            Err(error) => error.kind() != io::ErrorKind::Interrupted,
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // There is nobody to tell if the terminal is gone.
        if let Some(before) = &self.keys {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
        let _ = write_out("\x1b[?25h\x1b[?1049l");
    }
}

fn write_out(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}
