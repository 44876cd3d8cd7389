//! Who tries a throttled call again: the SDK by itself, or a caller who counts and paces calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_smithy_runtime_api::client::interceptors::context::InterceptorContext;
use aws_smithy_runtime_api::client::retries::classifiers::{
    ClassifyRetry, RetryAction, RetryClassifierPriority, RetryReason,
};

/// Set, a throttled call is not tried again: the caller does that, at its own pace.
#[derive(Clone, Debug, Default)]
pub(super) struct Paced(Arc<AtomicBool>);

impl Paced {
    /// From now on it is the caller's.
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl ClassifyRetry for Paced {
    fn classify_retry(&self, _: &InterceptorContext) -> RetryAction {
        RetryAction::NoActionIndicated
    }

    fn classify_retry_v2(&self, _: &InterceptorContext, previous: &RetryAction) -> RetryAction {
        let throttled = matches!((previous, RetryAction::throttling_error()), (
            RetryAction::RetryIndicated(RetryReason::RetryableError { kind, .. }),
            RetryAction::RetryIndicated(RetryReason::RetryableError { kind: throttling, .. }),
        ) if *kind == throttling);
        if throttled && self.0.load(Ordering::Relaxed) {
            RetryAction::RetryForbidden
        } else {
            RetryAction::NoActionIndicated
        }
    }

    /// After all others, whose verdict it must see.
    fn priority(&self) -> RetryClassifierPriority {
        RetryClassifierPriority::run_after(RetryClassifierPriority::transient_error_classifier())
    }

    fn name(&self) -> &'static str {
        "throttling is the caller's"
    }
}
