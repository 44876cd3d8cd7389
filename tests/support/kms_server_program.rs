//! The tests' own KMS as a program, for benchmarks and power cuts: prints one line of JSON that says how to reach it, and ends when
//! its standard input does.
#![allow(clippy::print_stdout)] // it is how the program speaks

#[allow(dead_code)]
#[path = "kms_server/mod.rs"]
mod kms_server;

use std::error::Error;
use std::io::{Read as _, Write as _};
use std::time::Duration;

use clap::Parser;
use kms_server::{ACCESS_KEY, KmsServer, Options, REGION, SECRET};

/// A KMS for tests. Its credentials are no secret: anyone who reaches the port can use it.
#[derive(Parser)]
struct Arguments {
    /// How long every call takes at least
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 0)]
    latency_ms: u64,
    /// Calls a second, beyond which it throttles
    #[arg(long, value_name = "CALLS", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// The port of 127.0.0.1 to listen on, or 0 for a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// How many keys it has; the first one is `key`, and all of them are `keys`
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    keys: u8,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { latency_ms, rate, port, keys } = Arguments::parse();
    let options = Options { port, latency: Duration::from_millis(latency_ms), rate, tls: false };
    let server = KmsServer::start_with(options)?;
    let keys: Vec<_> = (0..keys).map(|_| server.create_key().arn).collect();
    let line = serde_json::json!({
        "endpoint": server.endpoint(),
        "key": keys[0],
        "keys": keys,
        "region": REGION,
        "access_key_id": ACCESS_KEY,
        "secret_access_key": SECRET,
    });
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}")?;
    stdout.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
