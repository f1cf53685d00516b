                float d = x - x_top;
                float e = exp2_fast(d * rate);
                float g = soft * e;
                if (FORM == 1) g += gap * (x - y) * e;
                if (FORM <= 1) g += weight * exp2_fast((y - y_top) * rate);
                if (FORM >= 2) {
                    float lp = (y - y_top) * rate + y_offset, lq = d * rate + x_offset;
                    g += term * (FORM == 2 ? mixture_term(lp, lq, wp, wq, share) : variation_term(lp, lq)).slope;
                }
                if (HARD) g += hard * exp_hard<POWER>(d, e);
